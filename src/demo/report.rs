//! Report of the demo, as text and JSON.

use std::time::Duration;

use serde::Serialize;

use super::{client::ClientState, waterfall::waterfall};
use crate::{
    app::Account,
    coldstart::{ColdStart, ColdStartOutcome},
    domain::Period,
    error::Outcome,
    terminal::{Paint, duration, fit},
};

/// Report of the demo.
#[derive(Debug, Serialize)]
pub(super) struct DemoReport {
    version: &'static str,
    /// Configured load time of the model server.
    load_time: Period,
    cold_start: Option<ColdStart>,
    clients: ClientsReport,
    account: AccountReport,
    /// Errors; empty on success.
    pub(super) problems: Vec<String>,
}

/// Measurements of the clients, relative to the burst.
#[derive(Debug, Serialize)]
struct ClientsReport {
    requests: usize,
    completed: usize,
    tokens: u64,
    first_heartbeat_ms: Option<MinMedianMax>,
    first_token_ms: Option<MinMedianMax>,
    done_ms: Option<MinMedianMax>,
    each: Vec<ClientReport>,
}

#[derive(Debug, Serialize)]
struct ClientReport {
    heartbeats: u32,
    first_heartbeat_ms: Option<f64>,
    first_token_ms: Option<f64>,
    done_ms: Option<f64>,
    tokens: u32,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct MinMedianMax {
    min: f64,
    median: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct AccountReport {
    admitted: u64,
    outcomes: serde_json::Map<String, serde_json::Value>,
    held: u64,
    in_flight: u64,
    balances: bool,
}

// === impl DemoReport ===

impl DemoReport {
    pub(super) fn new(
        load_time: Period,
        cold_start: Option<ColdStart>,
        clients: Vec<ClientState>,
        account: &Account,
    ) -> Self {
        let mut problems = Vec::new();
        match &cold_start {
            None => problems.push("no cold start was recorded".to_owned()),
            Some(record) if record.outcome != Some(ColdStartOutcome::Completed) => {
                let outcome = record.outcome.map_or("unfinished", ColdStartOutcome::name);
                let reason = record.reason.as_deref().unwrap_or("unknown reason");
                problems.push(format!("the cold start ended as {outcome}: {reason}"));
            }
            Some(_) => {}
        }
        let clients = ClientsReport::new(clients);
        let failed = clients.requests - clients.completed;
        if let Some((number, error)) = clients.first_error() {
            let requests = clients.requests;
            problems.push(format!("{failed} of {requests} requests failed; #{number}: {error}"));
        }
        if !account.balances() {
            problems.push(format!("the request counts do not add up: {}", sum(account)));
        }
        let version = env!("CARGO_PKG_VERSION");
        Self { version, load_time, cold_start, clients, account: account.into(), problems }
    }

    /// Renders the report for a terminal.
    pub(super) fn lines(&self, account: &Account, paint: Paint, width: usize) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(cold_start) = &self.cold_start {
            lines.extend(cold_start_lines(cold_start, paint, width));
            lines.push(String::new());
        }
        let row = |name: &str, spread: Option<MinMedianMax>, none: &str| match spread {
            Some(MinMedianMax { median, max, .. }) => {
                format!("  {name:<17}{:>8} median {:>8} slowest", duration(median), duration(max))
            }
            None => format!("  {name:<17}    {none}"),
        };
        let clients = &self.clients;
        lines.push(paint.bold(&format!("Measured by the {}", client_count(clients.requests))));
        lines.push(row("first heartbeat", clients.first_heartbeat_ms, "none"));
        lines.push(row("first token", clients.first_token_ms, "none"));
        lines.push(row("complete answer", clients.done_ms, "none"));
        let completed = format!("{} of {} requests", clients.completed, clients.requests);
        let mark = if clients.completed == clients.requests { paint.good("✓") } else { paint.bad("✗") };
        lines.push(format!("  {:<17}{completed}, {} tokens {mark}", "completed", clients.tokens));
        lines.push(String::new());
        lines.push(paint.bold("Accounting: every admitted request has exactly one outcome"));
        let mark = if account.balances() { paint.good("✓") } else { paint.bad("✗") };
        lines.push(format!("  {} {mark}", sum(account)));
        lines
    }
}

/// Renders a cold start with its waterfall.
pub(super) fn cold_start_lines(cold_start: &ColdStart, paint: Paint, width: usize) -> Vec<String> {
    let outcome = cold_start.outcome.map_or("unfinished", ColdStartOutcome::name);
    let head = format!("Cold start #{} of route {}", cold_start.id, cold_start.route);
    let outcome = match cold_start.outcome {
        Some(ColdStartOutcome::Completed) => paint.good(outcome),
        Some(ColdStartOutcome::Failed) => paint.bad(outcome),
        Some(ColdStartOutcome::Abandoned) | None => paint.bold(outcome),
    };
    let mut lines = vec![format!(
        "{}: {outcome} in {}, {} held",
        paint.bold(&head),
        paint.bold(&duration(cold_start.total_ms)),
        request_count(cold_start.held_peak),
    )];
    lines.extend(
        cold_start
            .reason
            .iter()
            .map(|reason| format!("  {}", paint.bad(&fit(reason, width.saturating_sub(2))))),
    );
    lines.extend(
        cold_start
            .last_lines
            .iter()
            .map(|line| paint.dim(&format!("  │ {}", fit(line, width.saturating_sub(4))))),
    );
    lines.extend(waterfall(cold_start, paint));
    lines
}

/// Formats `1 request`, `8 requests`.
pub(super) fn request_count(count: usize) -> String {
    format!("{count} request{}", if count == 1 { "" } else { "s" })
}

fn client_count(count: usize) -> String {
    if count == 1 { "client".to_owned() } else { format!("{count} clients") }
}

/// Formats the account as a sum, without outcomes of zero.
fn sum(account: &Account) -> String {
    let outcomes =
        account.outcomes.iter().filter(|(name, count)| *count > 0 || *name == Outcome::Completed.name());
    let outcomes: String = outcomes.map(|(name, count)| format!("{count} {name} + ")).collect();
    let equals = if account.balances() { "=" } else { "≠" };
    format!(
        "{} admitted {equals} {outcomes}{} held + {} in flight",
        account.admitted, account.held, account.in_flight
    )
}

// === impl ClientsReport ===

impl ClientsReport {
    fn new(clients: Vec<ClientState>) -> Self {
        let spread = |time: fn(&ClientState) -> Option<Duration>| {
            MinMedianMax::of(clients.iter().filter_map(time).map(ms))
        };
        Self {
            requests: clients.len(),
            completed: clients
                .iter()
                .filter(|client| client.done.is_some() && client.error.is_none())
                .count(),
            tokens: clients.iter().map(|client| u64::from(client.tokens)).sum(),
            first_heartbeat_ms: spread(|client| client.first_heartbeat),
            first_token_ms: spread(|client| client.first_token),
            done_ms: spread(|client| client.done),
            each: clients.into_iter().map(Into::into).collect(),
        }
    }

    fn first_error(&self) -> Option<(usize, &str)> {
        self.each.iter().enumerate().find_map(|(index, client)| Some((index + 1, client.error.as_deref()?)))
    }
}

impl From<ClientState> for ClientReport {
    fn from(client: ClientState) -> Self {
        Self {
            heartbeats: client.heartbeats,
            first_heartbeat_ms: client.first_heartbeat.map(ms),
            first_token_ms: client.first_token.map(ms),
            done_ms: client.done.map(ms),
            tokens: client.tokens,
            text: client.text,
            error: client.error,
        }
    }
}

impl From<&Account> for AccountReport {
    fn from(account: &Account) -> Self {
        Self {
            admitted: account.admitted,
            outcomes: account
                .outcomes
                .iter()
                .map(|(name, count)| ((*name).to_owned(), (*count).into()))
                .collect(),
            held: account.held,
            in_flight: account.in_flight,
            balances: account.balances(),
        }
    }
}

// === impl MinMedianMax ===

impl MinMedianMax {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Some(Self { min: *values.first()?, median: values[(values.len() - 1) / 2], max: *values.last()? })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
