//! Expected values are from scipy 1.17.1 and numpy; the call is given beside each.

use proptest::prelude::*;

use super::*;

#[track_caller]
fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{found} is not {expected}");
}

const BASELINE_MS: [f64; 6] = [3073.2, 3080.1, 3069.9, 3101.4, 3077.7, 3090.0];
const CANDIDATE_MS: [f64; 6] = [3310.5, 3305.2, 3299.9, 3350.0, 3288.1, 3321.7];

#[test]
fn quantile_matches_numpy() {
    // numpy.quantile(values, q)
    let values = [3.1, 1.0, 4.7, 2.2, 9.8, 5.5];
    for (q, expected) in [(0.0, 1.0), (0.1, 1.6), (0.5, 3.9), (0.9, 7.65), (0.99, 9.585), (1.0, 9.8)] {
        close(quantile(&values, q).unwrap(), expected, 1e-12);
    }
    assert_eq!(quantile(&[], 0.5), None);
    assert_eq!(quantile(&[7.0], 0.99), Some(7.0));
}

#[test]
fn mann_whitney_matches_scipy() {
    let whole = |values: &[i32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    // scipy.stats.mannwhitneyu(a, b, method="exact").pvalue
    close(mann_whitney(&whole(&[19, 22, 16, 29, 24]), &whole(&[20, 11, 17, 12])), 0.111_111_111_111, 1e-9);
    close(mann_whitney(&BASELINE_MS, &CANDIDATE_MS), 0.002_164_502_164_502_164_5, 1e-12);
    let (a, b) = ([1.2, 3.4, 2.2, 5.9, 4.1, 2.8, 3.3], [2.9, 4.4, 6.1, 3.9, 5.0, 7.3, 4.8, 3.0]);
    close(mann_whitney(&a, &b), 0.093_861_693_861_693_87, 1e-12);
    // Ties, for which scipy has no exact method: scipy.stats.permutation_test over the sum of the midranks, all divisions.
    close(
        mann_whitney(&whole(&[1, 2, 2, 3, 5]), &whole(&[2, 3, 4, 5, 5, 6])),
        0.160_173_160_173_160_16,
        1e-12,
    );
    // More than 60 values: mannwhitneyu(range(1, 41), [x + 6.5 for x in range(1, 41)], method="asymptotic")
    let a: Vec<_> = (1..=40).map(f64::from).collect();
    let b: Vec<_> = a.iter().map(|value| value + 6.5).collect();
    close(mann_whitney(&a, &b), 0.021_734_997_211_659_477, 1e-6);
    // With ties: a = [x // 2 for x in range(1, 41)], b = [x // 2 + 5 for x in range(1, 41)]
    let a: Vec<_> = (1..=40).map(|value| f64::from(value / 2)).collect();
    let b: Vec<_> = a.iter().map(|value| value + 5.0).collect();
    close(mann_whitney(&a, &b), 0.000_789_320_787_671_993_4, 1e-6);
}

#[test]
fn mann_whitney_of_indistinct_samples_is_one() {
    assert_eq!(mann_whitney(&[], &[1.0]), 1.0);
    assert_eq!(mann_whitney(&[2.0; 5], &[2.0; 5]), 1.0);
    assert_eq!(mann_whitney(&[2.0; 50], &[2.0; 50]), 1.0);
    assert_eq!(mann_whitney(&[1.0], &[2.0]), 1.0);
}

#[test]
fn fisher_exact_matches_scipy() {
    // scipy.stats.fisher_exact([[1, 9], [11, 3]]).pvalue and so on: [[failed, ok], ...]
    close(fisher_exact([1, 11], [10, 14]), 0.002_759_456_185_220_083_6, 1e-9);
    close(fisher_exact([0, 4], [10, 10]), 0.086_687_306_501_547_99, 1e-9);
    close(fisher_exact([8, 1], [10, 6]), 0.034_965_034_965_034_975, 1e-9);
    close(fisher_exact([0, 0], [10, 10]), 1.0, 1e-9);
    assert_eq!(fisher_exact([0, 0], [0, 0]), 1.0);
}

#[test]
fn holm_multiplies_by_remaining_tests() {
    // 0.01 × 4, 0.02 × 3, 0.03 × 2 (at least the previous one), 0.5 × 1.
    assert_eq!(holm(&[0.5, 0.02, 0.01, 0.03]), [0.5, 0.06, 0.04, 0.06]);
    assert_eq!(holm(&[0.6, 0.9]), [1.0, 1.0]);
    assert_eq!(holm(&[]), [0.0; 0]);
}

#[test]
fn bootstrap_intervals_match_enumeration() {
    let singletons = |values: &[f64]| values.iter().map(|value| vec![*value]).collect::<Vec<_>>();
    let bootstrap = Bootstrap { resamples: 40_000, ..Bootstrap::default() };
    // Of all 5^5 resamples 5.8 % have the smallest value as median, so the interval spans all values.
    let five = [10.0, 20.0, 30.0, 40.0, 50.0];
    assert_eq!(bootstrap.median_interval(&singletons(&five)), Some([10.0, 50.0]));
    // numpy.quantile(medians of all 6^6 resamples, [0.025, 0.975])
    let six = [1.0, 4.0, 9.0, 16.0, 25.0, 36.0];
    assert_eq!(bootstrap.median_interval(&singletons(&six)), Some([2.5, 30.5]));
    // scipy.stats.bootstrap((b, a), ..., n_resamples=200000, method="percentile"): 209.3 to 256.05
    let [low, high] = bootstrap.difference_interval(&BASELINE_MS, &CANDIDATE_MS).unwrap();
    close(low, 209.3, 0.01);
    close(high, 256.05, 0.01);
    assert_eq!(bootstrap.median_interval(&singletons(&[1.0])), None);
}

#[test]
fn bootstrap_draws_whole_groups() {
    let bootstrap = Bootstrap::default();
    // Two groups are two observations, however many values they have: both medians are possible.
    let groups = [vec![1.0; 10], vec![2.0; 10]];
    assert_eq!(bootstrap.median_interval(&groups), Some([1.0, 2.0]));
    assert_eq!(bootstrap.median_interval(&[vec![1.0], vec![]]), None);
}

/// Generates small integers, so that ties are frequent.
fn sample(size: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec((0..12_i32).prop_map(f64::from), size)
}

/// Computes the exact p-value of [`mann_whitney`] by brute force over all divisions.
fn by_division(one: &[f64], other: &[f64]) -> f64 {
    let all: Vec<f64> = one.iter().chain(other).copied().collect();
    let rank = |value: f64| {
        let below = all.iter().filter(|other| **other < value).count();
        let equal = all.iter().filter(|other| **other == value).count();
        2 * below + equal + 1
    };
    let sum_of = |set: u32| (0..all.len()).filter(|i| set >> i & 1 == 1).map(|i| rank(all[i])).sum::<usize>();
    let seen = sum_of((1 << one.len()) - 1);
    let sets = (0_u32..1 << all.len()).filter(|set| set.count_ones() as usize == one.len());
    let sums: Vec<_> = sets.map(sum_of).collect();
    let share = |counted: usize| counted as f64 / sums.len() as f64;
    let below = share(sums.iter().filter(|sum| **sum <= seen).count());
    let above = share(sums.iter().filter(|sum| **sum >= seen).count());
    (2.0 * below.min(above)).min(1.0)
}

proptest! {
    #[test]
    fn mann_whitney_matches_brute_force(one in sample(1..6), other in sample(1..6)) {
        prop_assert!((mann_whitney(&one, &other) - by_division(&one, &other)).abs() < 1e-9);
    }

    #[test]
    fn mann_whitney_ignores_order_side_and_scale(one in sample(1..40), other in sample(1..40)) {
        let p = mann_whitney(&one, &other);
        prop_assert!(p > 0.0 && p <= 1.0);
        prop_assert!((p - mann_whitney(&other, &one)).abs() < 1e-9);
        let warped = |values: &[f64]| values.iter().rev().map(|value| (value / 3.0).exp()).collect::<Vec<_>>();
        prop_assert!((p - mann_whitney(&warped(&one), &warped(&other))).abs() < 1e-9);
    }

    #[test]
    fn quantile_is_monotonic_from_min_to_max(values in sample(1..30), q in 0.0..1.0_f64, more in 0.0..1.0_f64) {
        let (low, high) = (quantile(&values, q.min(more)).unwrap(), quantile(&values, q.max(more)).unwrap());
        prop_assert!(low <= high);
        prop_assert!(quantile(&values, 0.0).unwrap() <= low && high <= quantile(&values, 1.0).unwrap());
    }

    #[test]
    fn bootstrap_interval_is_deterministic_and_bounded(groups in prop::collection::vec(sample(1..4), 2..12)) {
        let bootstrap = Bootstrap { resamples: 200, ..Bootstrap::default() };
        let [low, high] = bootstrap.median_interval(&groups).unwrap();
        let all = groups.concat();
        prop_assert!(quantile(&all, 0.0).unwrap() <= low && low <= high && high <= quantile(&all, 1.0).unwrap());
        prop_assert_eq!(bootstrap.median_interval(&groups), Some([low, high]));
    }

    #[test]
    fn holm_keeps_order_and_never_lowers(p in prop::collection::vec(0.0..1.0_f64, 0..20)) {
        let adjusted = holm(&p);
        for (index, value) in adjusted.iter().enumerate() {
            prop_assert!(*value >= p[index] && *value <= 1.0);
            prop_assert!(p.iter().zip(&adjusted).all(|(other, theirs)| *other < p[index] || theirs >= value));
        }
        // The smallest is multiplied as by Bonferroni.
        if let Some(least) = p.iter().copied().reduce(f64::min) {
            let first = adjusted.iter().copied().fold(1.0, f64::min);
            prop_assert!((first - (least * p.len() as f64).min(1.0)).abs() < 1e-12);
        }
    }

    #[test]
    fn fisher_exact_is_symmetric(a in 0_u64..12, b in 0_u64..12, more_a in 0_u64..12, more_b in 0_u64..12) {
        let p = fisher_exact([a, b], [a + more_a, b + more_b]);
        prop_assert!(p > 0.0 && p <= 1.0);
        prop_assert!((p - fisher_exact([b, a], [b + more_b, a + more_a])).abs() < 1e-9);
    }
}
