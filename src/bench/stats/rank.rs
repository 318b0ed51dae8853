//! The Mann–Whitney U test.

/// Largest total number of values for which the p-value is computed exactly. Above, the normal approximation is as good.
const MAX_EXACT_VALUES: usize = 60;

/// Returns the two-sided p-value (twice the smaller tail) of the Mann–Whitney U test; 1 if either sample is empty.
///
/// Exact up to [`MAX_EXACT_VALUES`], ties included: counts all ways to divide the ranks between the samples. Above, the
/// normal approximation with corrections for continuity and ties.
pub(in crate::bench) fn mann_whitney(one: &[f64], other: &[f64]) -> f64 {
    if one.is_empty() || other.is_empty() {
        return 1.0;
    }
    let (ranks, sum) = doubled_ranks(one, other);
    if ranks.len() <= MAX_EXACT_VALUES {
        exact(&ranks, one.len(), sum)
    } else {
        approximate(&ranks, one.len(), sum)
    }
}

/// Returns the doubled ranks of all values, ties sharing their mean rank, and the rank sum of `one`. Doubling keeps them
/// integers.
fn doubled_ranks(one: &[f64], other: &[f64]) -> (Vec<usize>, usize) {
    let mut values: Vec<_> =
        one.iter().map(|value| (*value, true)).chain(other.iter().map(|value| (*value, false))).collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut ranks, mut sum) = (Vec::with_capacity(values.len()), 0);
    for equal in values.chunk_by(|a, b| a.0 == b.0) {
        // Sum of the first and last rank of the tie (from 1): twice its mean rank.
        let rank = 2 * ranks.len() + 1 + equal.len();
        sum += rank * equal.iter().filter(|(_, of_one)| *of_one).count();
        ranks.extend(std::iter::repeat_n(rank, equal.len()));
    }
    (ranks, sum)
}

fn exact(ranks: &[usize], size: usize, sum: usize) -> f64 {
    let most = ranks.iter().sum::<usize>();
    // ways[n][s]: number of ways to choose `n` ranks with the sum `s`.
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
    // Zero if all values are equal.
    if deviation == 0.0 { 1.0 } else { erfc(distance / deviation / std::f64::consts::SQRT_2).min(1.0) }
}

/// Complementary error function for `x >= 0`, with a relative error of 1.2e-7: the Chebyshev fit `erfcc` of Numerical
/// Recipes (Press et al., section 6.2).
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
