//! JSON output: schema `anteroom.dev/advise/v1`.

use serde::Serialize;
use serde_json::json;

use super::{
    advice::Advice,
    arrivals::stamp,
    choice::{Choice, Goal},
    grid::Figures,
    replay::ReplaySettings,
};

#[derive(Serialize)]
struct SettingRow<'a> {
    floor: u32,
    max_replicas: u32,
    /// `null` with a floor.
    idle_ms: Option<u64>,
    concurrency_max: u32,
    hold_timeout_ms: u64,
    hold_max_requests: usize,
    on_front: bool,
    gpu_hours_per_month: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_per_month: Option<f64>,
    /// Share of GPU hours saved relative to one replica that is always up.
    saved: f64,
    cold_starts_per_day: f64,
    figures: &'a Figures,
}

/// Renders the result.
pub(super) fn render(advice: &Advice<'_>) -> String {
    let (args, inputs) = (advice.args, advice.inputs);
    let rows: Vec<_> = advice
        .candidates
        .iter()
        .map(|one| SettingRow { on_front: one.on_front, ..row(advice, &one.settings, &one.figures) })
        .collect();
    let always_on = ReplaySettings { floor: 1, idle: u64::MAX, ..advice.candidates[0].settings };
    let value = json!({
        "schema": "anteroom.dev/advise/v1",
        "anteroom": env!("CARGO_PKG_VERSION"),
        "arrivals": {
            "source": inputs.source,
            "from": stamp(inputs.trace.from),
            "to": stamp(inputs.trace.to),
            "requests": inputs.trace.requests.len(),
            "wake_nothing": inputs.without_work,
            "not_understood": inputs.skipped,
        },
        "start_up": {
            "measured": inputs.records.is_some(),
            "failed": inputs.records.as_ref().map_or(0, |records| records.failed),
            "samples_ms": inputs.start_up,
        },
        "scale_by": args.scale_by,
        "gpus": args.gpus,
        "gpu_hour_price": args.gpu_hour_price,
        "seeds": advice.seeds,
        "goal": advice.goal.map(|goal| match goal {
            Goal::Wait(quantile, within) => json!({ "wait": quantile, "within_ms": within }),
            Goal::GpuHours(hours) => json!({ "gpu_hours_per_month": hours }),
        }),
        "max_lost": args.max_lost,
        "always_on": row(advice, &always_on, &advice.always_on),
        "settings": rows,
        "recommended": advice.choice.map(|choice| json!({
            "index": choice.index(),
            "reaches_goal": matches!(choice, Choice::Reached(_)),
        })),
    });
    format!("{value:#}\n")
}

fn row<'a>(advice: &Advice<'_>, settings: &ReplaySettings, figures: &'a Figures) -> SettingRow<'a> {
    let hours = figures.gpu_hours.middle * advice.windows_per_month();
    SettingRow {
        floor: settings.floor,
        max_replicas: settings.max_replicas,
        idle_ms: (settings.floor == 0).then_some(settings.idle),
        concurrency_max: settings.concurrency,
        hold_timeout_ms: settings.hold,
        hold_max_requests: settings.hold_requests,
        on_front: false,
        gpu_hours_per_month: hours,
        price_per_month: advice.args.gpu_hour_price.map(|price| price * hours),
        saved: advice.saved(figures),
        cold_starts_per_day: figures.cold_starts.middle / advice.days(),
        figures,
    }
}
