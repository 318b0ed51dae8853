//! Interactive part of the demo: reports changes of the route until Ctrl-C.

use std::time::Duration;

use indicatif::ProgressBar;
use tokio::time::{Instant, interval};

use super::{
    live::{freeze, message_line},
    proxy::DemoProxy,
    report::{cold_start_lines, request_count},
};
use crate::{
    state::Status,
    terminal::{Paint, duration, is_live, say, size},
};

/// Reports changes of the route.
pub(super) struct RouteWatch<'a> {
    proxy: &'a DemoProxy,
    began: Instant,
    paint: Paint,
    /// Current status below the log; only on a terminal.
    status_line: Option<ProgressBar>,
}

/// Interval of reads of the route's state.
const STATUS_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Returns commands to try in another terminal.
pub(super) fn hints(proxy: &DemoProxy, paint: Paint) -> Vec<String> {
    let DemoProxy { address, admin_address, idle_timeout, .. } = proxy;
    vec![
        String::new(),
        paint.bold("Try it, in another terminal"),
        format!("  curl -N http://{address}/v1/chat/completions \\"),
        "    -H 'content-type: application/json' \\".to_owned(),
        r#"    -d '{"model": "demo", "stream": true,"#.to_owned(),
        r#"         "messages": [{"role": "user", "content": "Hello"}]}'"#.to_owned(),
        format!("  curl http://{admin_address}/api/v1/cold-starts"),
        String::new(),
        format!("The model server stops after {idle_timeout} without a request; the next request wakes it."),
        "Ctrl-C ends the demo.".to_owned(),
        String::new(),
    ]
}

// === impl RouteWatch ===

impl<'a> RouteWatch<'a> {
    pub(super) fn new(proxy: &'a DemoProxy, began: Instant, paint: Paint) -> Self {
        let status_line = is_live().then(message_line);
        Self { proxy, began, paint, status_line }
    }

    /// Runs forever. Cancel-safe.
    pub(super) async fn watch(&self) {
        let mut status = self.proxy.gate.target().status();
        let mut shown = self.proxy.last_cold_start().map_or(0, |record| record.id);
        let mut ticks = interval(STATUS_POLL_INTERVAL);
        loop {
            ticks.tick().await;
            let new = self.proxy.gate.target().status();
            if new != status {
                self.report_change(&status, &new);
                status = new;
            }
            if let Some(record) = self.proxy.last_cold_start().filter(|record| record.id > shown) {
                shown = record.id;
                self.say("");
                cold_start_lines(&record, self.paint, size().0).iter().for_each(|line| self.say(line));
                self.say("");
            }
            if let Some(line) = &self.status_line {
                line.set_message(self.status_text(&status));
            }
        }
    }

    /// Keeps the status line as it is, after Ctrl-C.
    pub(super) fn freeze(&self) {
        if let Some(line) = &self.status_line {
            freeze(line);
        }
    }

    fn report_change(&self, before: &Status, status: &Status) {
        let text = match status {
            Status::Idle if matches!(before, Status::Ready | Status::Stopping) => {
                let idle_timeout = self.proxy.idle_timeout;
                format!("no request for {idle_timeout}: the model server is stopped")
            }
            Status::Idle => "no model server until the next request".to_owned(),
            Status::Starting => match self.proxy.gate.held() {
                0 => "the model server is started again".to_owned(),
                held => format!("{} held: the model server is started again", request_count(held)),
            },
            Status::Ready => "the model server is ready".to_owned(),
            Status::Failed(reason) => format!("the model server failed: {reason}"),
            Status::Sleeping => "the model server sleeps until the next request".to_owned(),
            // Reported when the server has stopped.
            Status::Stopping => return,
        };
        let elapsed = duration(self.began.elapsed().as_secs_f64() * 1e3);
        self.say(&format!("{elapsed:>9}  {text}"));
    }

    fn status_text(&self, status: &Status) -> String {
        let gate = &self.proxy.gate;
        let (held, in_flight) = (gate.held(), gate.in_flight());
        let text = match status {
            Status::Ready if held + in_flight as usize == 0 => {
                let quiet = gate.demand().since_last_activity().unwrap_or_default();
                let left = self.proxy.idle_timeout.get().saturating_sub(quiet).as_secs_f64().ceil();
                format!("no requests; stops in {left} s")
            }
            Status::Ready => format!("in flight {in_flight}, held {held}"),
            Status::Starting => {
                let (phase, waited) = gate
                    .cold_starts()
                    .phase()
                    .map_or(("", Duration::ZERO), |(phase, waited)| (phase.name(), waited));
                format!("{phase} {:.1} s, held {held}", waited.as_secs_f64())
            }
            Status::Idle | Status::Sleeping | Status::Stopping | Status::Failed(_) => format!("held {held}"),
        };
        let mark = match status {
            Status::Ready => self.paint.good("●"),
            Status::Failed(_) => self.paint.bad("●"),
            _ => self.paint.dim("○"),
        };
        format!("  {mark} {}  {}", self.paint.bold(status.name()), self.paint.dim(&text))
    }

    fn say(&self, line: &str) {
        match &self.status_line {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }
}
