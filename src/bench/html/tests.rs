use super::*;
use crate::bench::{
    fixture::{cycle, failed, loads, record, run},
    results::Run,
};
use crate::coldstart::{ColdStartOutcome, Phase};

const TIMES: [f64; 7] = [3010.0, 2990.0, 3020.0, 3000.0, 2980.0, 3030.0, 91_000.0];

/// HTML elements without an end tag.
const VOID: [&str; 4] = ["meta", "br", "link", "img"];

/// Counts the tags of a page. Panics if they are not nested or if text contains an unescaped angle bracket.
fn check_nesting(page: &str) -> usize {
    let mut open: Vec<&str> = Vec::new();
    let mut count = 0;
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    while let Some((text, after)) = rest.split_once('<') {
        assert!(open.last() == Some(&"style") || !text.contains('>'), "unescaped >: {text}");
        let (tag, after) = after.split_once('>').expect("a tag that ends");
        count += 1;
        let name = tag.split([' ', '\n']).next().unwrap();
        match name.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "before {}", &after[..after.len().min(80)]),
            None if tag.ends_with('/') || VOID.contains(&name) => {}
            None => {
                assert!(name.chars().all(|char| char.is_ascii_alphanumeric()), "no tag: <{tag}>");
                assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
                open.push(name);
            }
        }
        rest = after;
    }
    assert_eq!(open, [""; 0]);
    count
}

fn check_self_contained(page: &str) {
    for word in [
        "http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "<img", "<iframe",
        "srcset",
    ] {
        assert!(!page.contains(word), "{word} at {}", &page[page.find(word).unwrap_or(0)..][..80]);
    }
}

/// Returns the exact times of a row.
fn times(page: &str, row: &str) -> Vec<f64> {
    let (_, rest) = page.split_once(&format!("data-row=\"{row}\"")).expect("the row");
    let row = rest.split_once("</tr>").unwrap().0;
    row.split("data-ms=\"").skip(1).map(|cell| cell.split('"').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn page_is_well_formed_and_self_contained() {
    let page = page(&loads(&TIMES));
    assert!(check_nesting(&page) > 200);
    check_self_contained(&page);
    for id in ["where", "cycles", "spread", "numbers", "clocks", "cost", "how", "read"] {
        assert_eq!(page.matches(&format!("id=\"{id}\"")).count(), 1, "{id}");
    }
    assert!(!page.contains("NaN"));
}

#[test]
fn page_has_the_numbers_of_the_json() {
    let run = loads(&TIMES);
    let page = page(&run);
    let json: Run = serde_json::from_str(&serde_json::to_string(&run).unwrap()).unwrap();
    let rows: Vec<_> = json.summary.rows().collect();
    assert_eq!(rows.len(), 10);
    for row in rows {
        let [low, high] = row.ci_ms.unwrap();
        let expected = [row.median_ms, low, high, row.p90_ms, row.p99_ms, row.min_ms, row.max_ms];
        assert_eq!(times(&page, &row.name), expected, "{}", row.name);
    }
    // Sum of the medians: signal 1 + start 20 + load 3010 + first token 50.
    assert!(page.contains("data-ms=\"3081\""), "the sum of the medians");
}

#[test]
fn every_phase_colour_is_defined() {
    let all: Vec<_> = Phase::ALL.iter().map(|phase| (*phase, 10.0)).collect();
    let page = page(&run(vec![cycle(1, record(&all))]));
    for phase in Phase::ALL {
        let variable = text::colour(phase.name());
        let name = variable.trim_start_matches("var(").trim_end_matches(')');
        assert!(THEME_CSS.contains(&format!("{name}:")), "{name}");
        assert!(page.contains(&format!("fill:{variable}")), "{variable}");
    }
}

#[test]
fn failures_are_shown_and_escaped() {
    let mut broken = record(&[(Phase::Signal, 1.0), (Phase::Load, 500.0)]);
    broken.outcome = Some(ColdStartOutcome::Failed);
    broken.phases[1].unfinished = true;
    (broken.t_actuation_ms, broken.t_e2e_ms) = (None, None);
    broken.last_lines = vec!["Error: \u{7}<script>alert(1)</script>".to_owned()];
    let mut second = cycle(2, broken);
    second.verdict = CycleVerdict::Failed;
    second.error = Some("exit code 1 & more".to_owned());
    let mut run = run(vec![failed(1, "<b>no</b>"), second]);
    run.label = Some("\"</title><script>".to_owned());
    run.interrupted = true;
    let page = page(&run);
    check_nesting(&page);
    check_self_contained(&page);
    for text in [
        "&lt;b&gt;no&lt;/b&gt;",
        "exit code 1 &amp; more",
        "Interrupted: 2 of 2",
        "\u{fffd}&lt;script&gt;alert(1)",
        "class=\"cut\"",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("id=\"numbers\""), "no counted cycle, no numbers");
}

#[test]
fn run_without_cycles_renders() {
    let page = page(&run(Vec::new()));
    check_nesting(&page);
    assert!(page.contains("0/0"));
}
