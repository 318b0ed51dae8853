use super::{
    comparison::{Comparison, DifferenceClass, Thresholds},
    text::lines,
};
use crate::{
    bench::{
        cold_start::DEFAULT_CYCLES,
        fixture::{failed, loads, run},
        results::{CycleVerdict, Run},
        stats::mann_whitney,
    },
    terminal::Paint,
};

const THRESHOLDS: Thresholds = Thresholds { alpha: 0.05, threshold: 0.05, floor_ms: 10.0 };

/// Load times around 3 s, in milliseconds.
const USUAL: [f64; 6] = [3010.0, 2990.0, 3020.0, 3000.0, 2980.0, 3030.0];

fn by(factor: f64) -> Run {
    loads(&USUAL.map(|load| load * factor))
}

fn compare(before: &Run, after: &Run) -> Comparison {
    Comparison::of(before, after, THRESHOLDS).unwrap()
}

fn change(comparison: &Comparison, name: &str) -> DifferenceClass {
    comparison.rows.iter().find(|row| row.name == name).unwrap().change
}

#[test]
fn slower_phase_is_a_regression() {
    let comparison = compare(&by(1.0), &by(1.2));
    assert!(comparison.regression);
    for name in ["load", "load.weights", "t_actuation", "t_e2e", "ttft", "total"] {
        assert_eq!(change(&comparison, name), DifferenceClass::Worse, "{name}");
    }
    for name in ["signal", "start", "first_token", "t_first_token"] {
        assert_eq!(change(&comparison, name), DifferenceClass::Noise, "{name}");
    }
    let load = comparison.rows.iter().find(|row| row.name == "load").unwrap();
    // Medians: 3005 ms and 1.2 times that. Disjoint samples of 6 and 6 have p = 2/924, times 11 tests.
    assert!((load.difference_ms - 601.0).abs() < 1e-6, "{load:?}");
    assert!((load.difference_percent.unwrap() - 20.0).abs() < 1e-6);
    assert!((load.p - 2.0 / 924.0).abs() < 1e-12);
    assert_eq!(comparison.rows.len(), 10);
    assert!((load.p_corrected - 11.0 * 2.0 / 924.0).abs() < 1e-12, "{load:?}");
    let [low, high] = load.ci_ms.unwrap();
    assert!(low < 601.0 && 601.0 < high && low > 550.0 && high < 650.0, "{low} {high}");
    assert_eq!(comparison.warnings, [""; 0]);
    let text = lines(&comparison, Paint::plain(), None).join("\n");
    assert!(text.contains("+601 ms (+20.0 %)"), "{text}");
    assert!(
        text.ends_with("Regression: slower in load, load.weights, t_actuation, t_e2e, ttft, total."),
        "{text}"
    );
}

#[test]
fn narrow_table_has_no_intervals() {
    let comparison = compare(&by(1.0), &by(1.2));
    let text = lines(&comparison, Paint::plain(), Some(80));
    let rows = || text.iter().filter(|line| line.starts_with("  "));
    assert!(rows().all(|line| line.chars().count() <= 80), "{text:#?}");
    assert!(rows().any(|line| line.contains("+601 ms (+20.0 %)") && line.ends_with("slower")), "{text:#?}");
}

#[test]
fn faster_phase_is_no_regression() {
    let comparison = compare(&by(1.0), &by(0.8));
    assert!(!comparison.regression);
    assert_eq!(change(&comparison, "load"), DifferenceClass::Better);
    let text = lines(&comparison, Paint::plain(), None).join("\n");
    assert!(text.contains("No regression: faster in load"), "{text}");
}

#[test]
fn equal_runs_are_noise() {
    let comparison = compare(&by(1.0), &by(1.0));
    assert!(!comparison.regression);
    assert!(comparison.rows.iter().all(|row| row.change == DifferenceClass::Noise));
    assert_eq!(comparison.inconclusive, None);
    assert!(
        lines(&comparison, Paint::plain(), None).join("\n").contains("No regression: no significant change")
    );
}

#[test]
fn change_below_a_threshold_is_small() {
    // 3 % of 3 s: significant and above the floor of 10 ms, but below the threshold of 5 %.
    let comparison = compare(&by(1.0), &by(1.03));
    assert_eq!(change(&comparison, "load"), DifferenceClass::Small);
    assert!(!comparison.regression);
    let thresholds = Thresholds { threshold: 0.02, ..THRESHOLDS };
    assert!(Comparison::of(&by(1.0), &by(1.03), thresholds).unwrap().regression);
    // 8 ms of 40 ms: 20 %, but below the floor.
    let (before, after) = (loads(&USUAL.map(|load| load / 75.0)), loads(&USUAL.map(|load| load / 62.5)));
    assert_eq!(change(&compare(&before, &after), "load"), DifferenceClass::Small);
}

#[test]
fn too_few_cycles_cannot_rule_out_a_regression() {
    let (before, after) = (loads(&USUAL[..5]), loads(&USUAL.map(|load| load * 1.34)[..5]));
    let comparison = compare(&before, &after);
    assert!(!comparison.regression);
    // 11 tests × 2/C(10, 5) = 0.087; 11 × 2/C(12, 6) = 0.024.
    assert_eq!(comparison.inconclusive.unwrap().cycles_needed, Some(6));
    let text = lines(&comparison, Paint::plain(), None).join("\n");
    assert!(text.contains("Cannot tell: with 5 and 5 cycles, a slowdown of t_e2e by 15"), "{text}");
    assert!(text.ends_with("(5 %) would not be significant; measure at least 6 cycles per run."), "{text}");
}

#[test]
fn wide_spread_cannot_rule_out_a_regression() {
    let spread = loads(&[2000.0, 2400.0, 2800.0, 3200.0, 3600.0, 4000.0]);
    let needed = compare(&spread, &spread).inconclusive.unwrap().cycles_needed;
    assert!(needed.is_none_or(|cycles| cycles > 20), "{needed:?}");
    let thresholds = Thresholds { threshold: 0.8, ..THRESHOLDS };
    assert_eq!(Comparison::of(&spread, &spread, thresholds).unwrap().inconclusive, None);
}

/// The arithmetic is in the comment of `DEFAULT_CYCLES`. 17 tests are those of the stand-in.
#[test]
fn default_cycles_show_a_slowdown_of_20_percent() {
    let count = usize::from(DEFAULT_CYCLES);
    // From 0.9 to 1.1 times the median.
    let usual: Vec<_> = (0..count).map(|place| 2700.0 + 600.0 * place as f64 / (count - 1) as f64).collect();
    let slower: Vec<_> = usual.iter().map(|load| load * 1.2).collect();
    assert!(mann_whitney(&usual, &slower) * 17.0 <= 0.05);
    assert!(compare(&loads(&usual), &loads(&slower)).regression);
    // Four of the 64 pairs in the wrong order are significant, five are not.
    let ranks = |late: f64| {
        mann_whitney(
            &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, late],
            &[8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0],
        )
    };
    assert!(ranks(11.5) * 17.0 <= 0.05 && ranks(12.5) * 17.0 > 0.05);
}

#[test]
fn differing_settings_are_warned_about() {
    let mut after = by(1.0);
    after.burst = 8;
    after.settings.stream = false;
    after.interrupted = true;
    after.cycles[0].verdict = CycleVerdict::NotCold;
    let warnings = compare(&by(1.0), &after).warnings.join("\n");
    for expected in [
        "differ in burst: 1 before, 8 after",
        "stream: true before, false after",
        "1 cycles of the run after were not cold",
        "the run after ended before all 6 cycles",
    ] {
        assert!(warnings.contains(expected), "{warnings}");
    }
}

#[test]
fn more_failed_cycles_are_a_regression() {
    let with_failures = |count: usize| {
        let mut cycles = by(1.0).cycles;
        cycles.extend((0..count).map(|index| failed(7 + index, "exit code 1")));
        run(cycles)
    };
    // scipy.stats.fisher_exact of 0/6 and 20/26 gives 0.00116, times 11 tests.
    let comparison = compare(&by(1.0), &with_failures(20));
    assert_eq!((comparison.failures.failed, comparison.failures.of), ([0, 20], [6, 26]));
    assert_eq!(comparison.failures.change, DifferenceClass::Worse);
    assert!(comparison.regression);
    assert!(lines(&comparison, Paint::plain(), None).join("\n").contains("cold starts fail more often"));
    assert_eq!(compare(&with_failures(20), &by(1.0)).failures.change, DifferenceClass::Better);
    assert!(!compare(&by(1.0), &with_failures(1)).regression);
    // No cycle succeeds.
    assert!(compare(&by(1.0), &run(vec![failed(1, "exit code 1")])).regression);
}

#[test]
fn run_without_counted_cycles_is_an_error() {
    let nothing = run(Vec::new());
    for (before, after) in [(&nothing, &by(1.0)), (&by(1.0), &nothing)] {
        let error = Comparison::of(before, after, THRESHOLDS).unwrap_err();
        assert!(error.contains("repeat the measurement"), "{error}");
    }
}

#[test]
fn metric_of_one_run_only_is_listed() {
    let mut after = by(1.0);
    for cycle in &mut after.cycles {
        cycle.cold_start.as_mut().unwrap().phases[2].parts.clear();
    }
    let comparison = compare(&by(1.0), &after);
    assert_eq!((comparison.only_before, comparison.only_after), (vec!["load.weights".to_owned()], vec![]));
}
