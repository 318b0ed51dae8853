//! The rank test of Mann and Whitney: whether one of two samples tends to be larger.

/// Up to so many values of both samples the p-value is counted out; above, the normal distribution is as good.
const EXACT: usize = 60;

/// The two-sided p-value of the Mann–Whitney U test: how often two samples of these sizes would differ as much as these
/// do, or more, if they came from the same distribution.
///
/// Up to 60 values it is exact, equal values included: all ways to divide the ranks between the samples are counted.
/// Above, it is the normal approximation with the corrections for continuity and for equal values. Two-sided means twice
/// the smaller tail. 1 if either sample is empty.
pub fn mann_whitney(one: &[f64], other: &[f64]) -> f64 {
    if one.is_empty() || other.is_empty() {
        return 1.0;
    }
    let (ranks, sum) = doubled_ranks(one, other);
    if ranks.len() <= EXACT { exact(&ranks, one.len(), sum) } else { approximate(&ranks, one.len(), sum) }
}

/// The smallest p-value that samples of these sizes can have, however much they differ.
pub fn smallest_p(one: usize, other: usize) -> f64 {
    // Two of C(one + other, one) ways.
    let ways = (1..=one).map(|place| (other + place) as f64 / place as f64).product::<f64>();
    (2.0 / ways).min(1.0)
}

/// Twice the rank of each value of both samples, equal ones sharing the mean of theirs, and the sum of those of `one`.
fn doubled_ranks(one: &[f64], other: &[f64]) -> (Vec<usize>, usize) {
    let mut values: Vec<_> =
        one.iter().map(|value| (*value, true)).chain(other.iter().map(|value| (*value, false))).collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut ranks, mut sum) = (Vec::with_capacity(values.len()), 0);
    for equal in values.chunk_by(|a, b| a.0 == b.0) {
        // First and last rank of these, counted from 1: their sum is twice the mean.
        let rank = 2 * ranks.len() + 1 + equal.len();
        sum += rank * equal.iter().filter(|(_, of_one)| *of_one).count();
        ranks.extend(std::iter::repeat_n(rank, equal.len()));
    }
    (ranks, sum)
}

fn exact(ranks: &[usize], size: usize, sum: usize) -> f64 {
    let most = ranks.iter().sum::<usize>();
    // How many ways there are to choose `n` of the ranks so that they have this sum.
    let mut ways = vec![vec![0.0_f64; most + 1]; size + 1];
    ways[0][0] = 1.0;
    for rank in ranks {
        for n in (1..=size).rev() {
            let (fewer, these) = ways.split_at_mut(n);
            for (to, from) in these[0][*rank..].iter_mut().zip(&fewer[n - 1]) {
                *to += from;
            }
        }
    }
    let ways = &ways[size];
    let (below, above) = (ways[..=sum].iter().sum::<f64>(), ways[sum..].iter().sum::<f64>());
    (2.0 * below.min(above) / ways.iter().sum::<f64>()).min(1.0)
}

fn approximate(ranks: &[usize], size: usize, sum: usize) -> f64 {
    let (n, one) = (ranks.len() as f64, size as f64);
    let other = n - one;
    let u = sum as f64 / 2.0 - one * (one + 1.0) / 2.0;
    let ties: f64 =
        ranks.chunk_by(|a, b| a == b).map(|equal| (equal.len() as f64).powi(3) - equal.len() as f64).sum();
    let deviation = (one * other / 12.0 * (n + 1.0 - ties / (n * (n - 1.0)))).sqrt();
    let distance = ((u - one * other / 2.0).abs() - 0.5).max(0.0);
    // All values are the same.
    if deviation == 0.0 { 1.0 } else { erfc(distance / deviation / std::f64::consts::SQRT_2).min(1.0) }
}

/// The complementary error function of a value that is not negative, to 1.2e-7 of its value: the Chebyshev fit of
/// Numerical Recipes (Press et al., section 6.2, `erfcc`).
fn erfc(x: f64) -> f64 {
    const FIT: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let t = 1.0 / (1.0 + 0.5 * x);
    t * (-x * x + FIT.iter().rev().fold(0.0, |sum, factor| sum * t + factor)).exp()
}
