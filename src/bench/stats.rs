//! Statistics: quantiles, bootstrap confidence intervals and significance tests. Pure functions.

mod fisher;
mod rank;
#[cfg(test)]
mod tests;

pub(super) use fisher::fisher_exact;
pub(super) use rank::mann_whitney;

/// Bootstrap of confidence intervals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bootstrap {
    /// Number of resamples.
    pub(super) resamples: u32,
    /// Seed of the random numbers. Equal seeds give equal intervals.
    pub(super) seed: u64,
    /// Confidence level, between 0 and 1.
    pub(super) confidence: f64,
}

/// Returns the `q` quantile (0 to 1), with linear interpolation: type 7 of Hyndman and Fan (1996), the default of
/// numpy's `quantile`. Returns `None` for an empty slice.
pub(super) fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile_of_sorted(&sorted, q)
}

/// Returns the median, or `None` for an empty slice.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

fn quantile_of_sorted(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (below, share) = (place.floor() as usize, place.fract());
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    // Clamped: rounding must not leave the interval of the two neighbours.
    Some((low + (high - low) * share).clamp(low, high))
}

/// Adjusts p-values for multiple comparisons by Holm (1979), which bounds the family-wise error rate without assuming
/// independence. Keeps the order of the input.
pub(super) fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<_> = (0..p_values.len()).collect();
    order.sort_by(|one, other| p_values[*one].total_cmp(&p_values[*other]));
    let mut adjusted = vec![1.0; p_values.len()];
    let mut running_max = 0.0_f64;
    for (place, index) in order.iter().enumerate() {
        running_max = running_max.max((p_values.len() - place) as f64 * p_values[*index]).min(1.0);
        adjusted[*index] = running_max;
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
    /// Returns the percentile interval of the median. Resamples whole groups (a cluster bootstrap), because values of one
    /// group, such as the requests of a burst, are correlated. Returns `None` with fewer than two non-empty groups.
    pub(super) fn median_interval(&self, groups: &[Vec<f64>]) -> Option<[f64; 2]> {
        let mut sample = Resampler::new(groups)?;
        let mut random = fastrand::Rng::with_seed(self.seed);
        Some(self.interval((0..self.resamples).map(|_| sample.draw(&mut random)).collect()))
    }

    /// Returns the percentile interval of the difference of medians, `after` minus `before`.
    pub(super) fn difference_interval(&self, before: &[f64], after: &[f64]) -> Option<[f64; 2]> {
        let singletons = |values: &[f64]| values.iter().map(|value| vec![*value]).collect::<Vec<_>>();
        let (mut before, mut after) =
            (Resampler::new(&singletons(before))?, Resampler::new(&singletons(after))?);
        let mut random = fastrand::Rng::with_seed(self.seed);
        let draws = (0..self.resamples).map(|_| after.draw(&mut random) - before.draw(&mut random));
        Some(self.interval(draws.collect()))
    }

    fn interval(&self, mut draws: Vec<f64>) -> [f64; 2] {
        draws.sort_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        [tail, 1.0 - tail].map(|q| quantile_of_sorted(&draws, q).unwrap_or(f64::NAN))
    }
}

/// Draws resamples of grouped values. The values are sorted once; a draw counts groups, and its median takes one pass.
struct Resampler {
    /// Sorted values, each with the index of its group.
    values: Vec<(f64, usize)>,
    /// Number of values per group.
    sizes: Vec<usize>,
    /// Multiplicity of each group in the current draw.
    drawn: Vec<usize>,
}

// === impl Resampler ===

impl Resampler {
    fn new(groups: &[Vec<f64>]) -> Option<Self> {
        let groups = groups.iter().filter(|group| !group.is_empty());
        let sizes: Vec<_> = groups.clone().map(Vec::len).collect();
        let values = groups.enumerate().flat_map(|(group, values)| values.iter().map(move |v| (*v, group)));
        let mut values: Vec<_> = values.collect();
        values.sort_by(|one, other| one.0.total_cmp(&other.0));
        (sizes.len() > 1).then(|| Self { values, drawn: vec![0; sizes.len()], sizes })
    }

    /// Returns the median of a draw: as many groups as there are, with replacement.
    fn draw(&mut self, random: &mut fastrand::Rng) -> f64 {
        self.drawn.fill(0);
        let mut count = 0;
        for _ in 0..self.sizes.len() {
            let group = random.usize(..self.sizes.len());
            self.drawn[group] += 1;
            count += self.sizes[group];
        }
        // Indices of the middle values; equal if the count is odd.
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
