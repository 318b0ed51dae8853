//! Waterfall chart of a cold start: phases as bars on a time axis.

use owo_colors::Style;

use crate::{
    coldstart::{ColdStart, Phase},
    terminal::{Paint, duration, fit},
};

/// Width of the axis.
const AXIS_CHARS: usize = 36;

/// Width before the axis: indent, name, start, duration, share.
const PREFIX_CHARS: usize = 2 + 11 + 9 + 9 + 7 + 2;

/// Renders the chart.
pub(super) fn waterfall(cold_start: &ColdStart, paint: Paint) -> Vec<String> {
    let total = cold_start.total_ms;
    let head = format!("  {:<11}{:>9}{:>9}{:>7}", "phase", "start", "took", "share");
    let mut lines = vec![paint.dim(&head)];
    for span in &cold_start.phases {
        let style = style(span.name);
        let (start, cells) = bar(span.start_ms, span.duration_ms, total);
        lines.push(format!(
            "  {}{:>9}{:>9}{:>7}  {}{}",
            paint.paint(&format!("{:<11}", span.name.name()), style),
            duration(span.start_ms),
            duration(span.duration_ms),
            share(span.duration_ms, total),
            " ".repeat(start),
            paint.paint(&cells, style),
        ));
    }
    let (ruler, labels) = axis(total);
    let sum = format!("  {:<11}{:>9}{:>9}{:>7}  ", "total", "", duration(total), share(total, total));
    lines.push(format!("{}{}", paint.bold(&sum), paint.dim(&ruler)));
    lines.push(paint.dim(&format!("{}{labels}", " ".repeat(PREFIX_CHARS))));
    lines
}

/// Returns the colour of a phase, also used by the live display.
pub(super) const fn style(phase: Phase) -> Style {
    let style = Style::new();
    match phase {
        Phase::Signal | Phase::Scale => style.magenta(),
        Phase::Create | Phase::Schedule | Phase::Pull | Phase::Start => style.blue(),
        Phase::Load => style.yellow(),
        Phase::Propagate | Phase::Dispatch => style.cyan(),
        Phase::FirstByte | Phase::FirstToken => style.green(),
    }
}

/// Returns the start and the cells of a bar. Bars of adjacent phases join without a gap; a bar shorter than a cell is a thin
/// line.
fn bar(start_ms: f64, duration_ms: f64, total_ms: f64) -> (usize, String) {
    let cell = |ms: f64| (ms / total_ms.max(f64::MIN_POSITIVE) * AXIS_CHARS as f64).round() as usize;
    let (start, end) = (cell(start_ms).min(AXIS_CHARS), cell(start_ms + duration_ms).min(AXIS_CHARS));
    match end.saturating_sub(start) {
        0 if start == AXIS_CHARS => (AXIS_CHARS - 1, "▕".to_owned()),
        0 => (start, "▏".to_owned()),
        cells => (start, "█".repeat(cells)),
    }
}

fn share(part: f64, whole: f64) -> String {
    match 100.0 * part / whole.max(f64::MIN_POSITIVE) {
        percent if percent < 0.5 => "<1 %".to_owned(),
        percent if percent > 99.5 && part < whole => ">99 %".to_owned(),
        percent => format!("{percent:.0} %"),
    }
}

/// Renders the axis and its labels: round times, at most five steps.
fn axis(total_ms: f64) -> (String, String) {
    let rough = total_ms.max(1.0) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let mut ruler = vec!['─'; AXIS_CHARS];
    let mut labels = String::new();
    for mark in 0.. {
        let ms = f64::from(mark) * step;
        let place = (ms / total_ms.max(1.0) * AXIS_CHARS as f64).round() as usize;
        if place >= AXIS_CHARS {
            break;
        }
        ruler[place] = if mark == 0 { '├' } else { '┼' };
        let label = if mark == 0 { "0".to_owned() } else { round_label(ms, step, total_ms) };
        labels = fit(&labels, place.saturating_sub(1));
        labels += &" ".repeat(place.saturating_sub(labels.chars().count()));
        labels += &label;
    }
    ruler[AXIS_CHARS - 1] = '┤';
    (ruler.into_iter().collect(), labels)
}

/// Formats a label with the precision of the step.
fn round_label(ms: f64, step: f64, total_ms: f64) -> String {
    match step {
        _ if total_ms < 1000.0 => format!("{ms} ms"),
        step if step < 1000.0 => format!("{:.1} s", ms / 1e3),
        _ => format!("{:.0} s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_of_adjacent_phases_join() {
        let record = ColdStart::of_phases(&[
            (Phase::Signal, 0.4),
            (Phase::Start, 12.0),
            (Phase::Load, 3000.0),
            (Phase::Dispatch, 0.6),
            (Phase::FirstByte, 287.0),
        ]);
        let lines = waterfall(&record, Paint::plain());
        assert_eq!(
            lines.join("\n"),
            "  phase          start     took  share
  signal             0   0.4 ms   <1 %  ▏
  start         0.4 ms    12 ms   <1 %  ▏
  load           12 ms   3.00 s   91 %  █████████████████████████████████
  dispatch      3.01 s   0.6 ms   <1 %                                   ▏
  first_byte    3.01 s   287 ms    9 %                                   ███
  total                  3.30 s  100 %  ├──────────┼──────────┼──────────┼─┤
                                        0          1 s        2 s        3 s"
        );
    }

    #[test]
    fn axis_has_few_round_marks() {
        let labels = |total_ms| {
            axis(total_ms)
                .1
                .split("  ")
                .map(str::trim)
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
                .join(", ")
        };
        assert_eq!(labels(350.0), "0, 100 ms, 200 ms, 300 ms");
        assert_eq!(labels(4_200.0), "0, 1 s, 2 s, 3 s, 4 s");
        assert_eq!(labels(95_000.0), "0, 20 s, 40 s, 60 s, 80 s");
        assert_eq!(axis(0.0).0.chars().count(), AXIS_CHARS);
    }
}
