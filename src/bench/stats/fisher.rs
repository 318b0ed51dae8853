//! Fisher's exact test: whether one of two runs fails more often.

/// The two-sided p-value of Fisher's exact test of `failed` of `all`, before and after: the chance of all divisions of
/// the failures that are no more likely than this one, if both fail equally often. 1 where there is nothing to compare.
pub fn fisher_exact(failed: [u64; 2], all: [u64; 2]) -> f64 {
    let failures = failed[0] + failed[1];
    // The logarithm of the number of ways to divide the failures so that this many are of the first.
    let ways = |first: u64| log_choose(all[0], first) + log_choose(all[1], failures - first);
    let possible = failures.saturating_sub(all[1])..=failures.min(all[0]);
    if !possible.contains(&failed[0]) {
        return 1.0;
    }
    let whole = log_choose(all[0] + all[1], failures);
    // Equally likely ones are to count in spite of rounding.
    let seen = ways(failed[0]) + 1e-7;
    let p: f64 = possible.map(ways).filter(|ways| *ways <= seen).map(|ways| (ways - whole).exp()).sum();
    p.min(1.0)
}

fn log_choose(n: u64, k: u64) -> f64 {
    (1..=k).map(|place| (((n - k + place) as f64) / place as f64).ln()).sum()
}
