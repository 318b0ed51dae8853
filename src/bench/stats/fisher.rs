//! Fisher's exact test of two failure rates.

/// Returns the two-sided p-value of `failed` out of `all`, before and after: the probability, under equal failure rates,
/// of all tables that are at most as likely as this one. Returns 1 if there is nothing to compare.
pub(in crate::bench) fn fisher_exact(failed: [u64; 2], all: [u64; 2]) -> f64 {
    let failures = failed[0] + failed[1];
    // Logarithm of the number of tables with `first` failures before.
    let ways = |first: u64| log_choose(all[0], first) + log_choose(all[1], failures - first);
    let possible = failures.saturating_sub(all[1])..=failures.min(all[0]);
    if !possible.contains(&failed[0]) {
        return 1.0;
    }
    let whole = log_choose(all[0] + all[1], failures);
    // Tolerance: equally likely tables must count in spite of rounding.
    let seen = ways(failed[0]) + 1e-7;
    let p: f64 = possible.map(ways).filter(|ways| *ways <= seen).map(|ways| (ways - whole).exp()).sum();
    p.min(1.0)
}

fn log_choose(n: u64, k: u64) -> f64 {
    (1..=k).map(|place| (((n - k + place) as f64) / place as f64).ln()).sum()
}
