//! Statistics, pure: quantiles, the bootstrap, and tests of whether a difference is noise.

mod fisher;
mod rank;
#[cfg(test)]
mod tests;

pub use fisher::fisher_exact;
pub use rank::{mann_whitney, smallest_p};

/// How confidence intervals are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bootstrap {
    /// How many samples are drawn from the sample.
    pub resamples: u32,
    /// What they are drawn with; the same gives the same intervals.
    pub seed: u64,
    /// The share of intervals that are to contain the truth, between 0 and 1.
    pub confidence: f64,
}

/// The value that a share `q` (0 to 1) of the values do not exceed: between two of them by linear interpolation, as
/// numpy's `quantile` does by default (type 7 of Hyndman and Fan, 1996). `None` of nothing.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    of_sorted(&sorted, q)
}

/// The middle value, or the mean of the two in the middle. `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

fn of_sorted(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (below, share) = (place.floor() as usize, place.fract());
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    // Of two equal values it is exactly theirs, and never beyond either.
    Some((low + (high - low) * share).clamp(low, high))
}

/// Holm's correction (1979): p-values as they count when several are looked at, so that the chance of a single false
/// alarm among all of them stays below alpha, whether they depend on each other or not. In the order given.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<_> = (0..p_values.len()).collect();
    order.sort_by(|one, other| p_values[*one].total_cmp(&p_values[*other]));
    let mut adjusted = vec![1.0; p_values.len()];
    let mut least = 0.0_f64;
    for (place, index) in order.iter().enumerate() {
        least = least.max((p_values.len() - place) as f64 * p_values[*index]).min(1.0);
        adjusted[*index] = least;
    }
    adjusted
}

// === impl Bootstrap ===

impl Default for Bootstrap {
    fn default() -> Self {
        Self { resamples: 10_000, seed: 1, confidence: 0.95 }
    }
}

impl Bootstrap {
    /// The interval of the median, by the percentile method. What is drawn are whole groups: values that came about
    /// together, such as the requests of one burst, tell less than as many that did not. `None` with fewer than two
    /// groups that have values.
    pub fn median_interval(&self, groups: &[Vec<f64>]) -> Option<[f64; 2]> {
        let mut sample = Sample::new(groups)?;
        let mut random = fastrand::Rng::with_seed(self.seed);
        Some(self.interval((0..self.resamples).map(|_| sample.draw(&mut random)).collect()))
    }

    /// The interval of the median of `after` less that of `before`.
    pub fn difference_interval(&self, before: &[f64], after: &[f64]) -> Option<[f64; 2]> {
        let alone = |values: &[f64]| values.iter().map(|value| vec![*value]).collect::<Vec<_>>();
        let (mut before, mut after) = (Sample::new(&alone(before))?, Sample::new(&alone(after))?);
        let mut random = fastrand::Rng::with_seed(self.seed);
        let draws = (0..self.resamples).map(|_| after.draw(&mut random) - before.draw(&mut random));
        Some(self.interval(draws.collect()))
    }

    fn interval(&self, mut draws: Vec<f64>) -> [f64; 2] {
        draws.sort_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        [tail, 1.0 - tail].map(|q| of_sorted(&draws, q).unwrap_or(f64::NAN))
    }
}

/// Values in groups, sorted once: a drawn sample is how often each group is in it, and its median is found in one walk.
struct Sample {
    /// The values in order, each with its group.
    values: Vec<(f64, usize)>,
    /// How many values each group has.
    sizes: Vec<usize>,
    /// How often each group has been drawn.
    drawn: Vec<usize>,
}

// === impl Sample ===

impl Sample {
    fn new(groups: &[Vec<f64>]) -> Option<Self> {
        let groups = groups.iter().filter(|group| !group.is_empty());
        let sizes: Vec<_> = groups.clone().map(Vec::len).collect();
        let values = groups.enumerate().flat_map(|(group, values)| values.iter().map(move |v| (*v, group)));
        let mut values: Vec<_> = values.collect();
        values.sort_by(|one, other| one.0.total_cmp(&other.0));
        (sizes.len() > 1).then(|| Self { values, drawn: vec![0; sizes.len()], sizes })
    }

    /// The median of as many groups as there are, drawn with replacement.
    fn draw(&mut self, random: &mut fastrand::Rng) -> f64 {
        self.drawn.fill(0);
        let mut count = 0;
        for _ in 0..self.sizes.len() {
            let group = random.usize(..self.sizes.len());
            self.drawn[group] += 1;
            count += self.sizes[group];
        }
        // The values at these places, the same one if the count is odd.
        let (lower, upper) = ((count - 1) / 2, count / 2);
        let (mut passed, mut low) = (0, None);
        for (value, group) in &self.values {
            passed += self.drawn[*group];
            if passed > lower {
                let low = *low.get_or_insert(*value);
                if passed > upper {
                    return f64::midpoint(low, *value);
                }
            }
        }
        f64::NAN
    }
}
