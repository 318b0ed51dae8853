//! After the report: the proxy goes on, for whoever wants to try it.

use std::time::Duration;

use indicatif::ProgressBar;
use tokio::time::{Instant, interval};

use super::{
    live::{freeze, line},
    report::{cold_start_lines, requests_in_words},
    stage::Stage,
};
use crate::{
    state::Status,
    terminal::{Paint, duration, is_live, say, size},
};

/// Tells what happens to the route.
pub(super) struct Stay<'a> {
    stage: &'a Stage,
    began: Instant,
    paint: Paint,
    /// What is now, below what has been; on a terminal.
    now: Option<ProgressBar>,
}

const LOOK: Duration = Duration::from_millis(50);

/// What to try, in another terminal.
pub(super) fn hints(stage: &Stage, paint: Paint) -> Vec<String> {
    let Stage { address, admin_address, idle_timeout, .. } = stage;
    vec![
        String::new(),
        paint.bold("Try it, in another terminal"),
        format!("  curl -N http://{address}/v1/chat/completions \\"),
        "    -H 'content-type: application/json' \\".to_owned(),
        r#"    -d '{"model": "demo", "stream": true,"#.to_owned(),
        r#"         "messages": [{"role": "user", "content": "Hello"}]}'"#.to_owned(),
        format!("  curl http://{admin_address}/api/v1/cold-starts"),
        String::new(),
        format!("After {idle_timeout} without a request the model server is stopped; the next one wakes it."),
        "Ctrl-C ends the demo.".to_owned(),
        String::new(),
    ]
}

// === impl Stay ===

impl<'a> Stay<'a> {
    pub(super) fn new(stage: &'a Stage, began: Instant, paint: Paint) -> Self {
        let now = is_live().then(line);
        Self { stage, began, paint, now }
    }

    /// Goes on for ever. Cancel-safe.
    pub(super) async fn watch(&self) {
        let mut status = self.stage.gate.target().status();
        let mut shown = self.stage.last_cold_start().map_or(0, |record| record.id);
        let mut looks = interval(LOOK);
        loop {
            looks.tick().await;
            let new = self.stage.gate.target().status();
            if new != status {
                self.changed(&status, &new);
                status = new;
            }
            if let Some(record) = self.stage.last_cold_start().filter(|record| record.id > shown) {
                shown = record.id;
                self.say("");
                cold_start_lines(&record, self.paint, size().0).iter().for_each(|line| self.say(line));
                self.say("");
            }
            if let Some(now) = &self.now {
                now.set_message(self.now(&status));
            }
        }
    }

    /// After a Ctrl-C.
    pub(super) fn freeze(&self) {
        if let Some(now) = &self.now {
            freeze(now);
        }
    }

    fn changed(&self, before: &Status, status: &Status) {
        let what = match status {
            Status::Idle if matches!(before, Status::Ready | Status::Stopping) => {
                let idle_timeout = self.stage.idle_timeout;
                format!("no request for {idle_timeout}: the model server is stopped, and nothing runs")
            }
            Status::Idle => "nothing runs until the next request".to_owned(),
            Status::Starting => match self.stage.gate.held() {
                0 => "woken: the model server is started again".to_owned(),
                held => format!("woken: {} held, the model server is started again", requests_in_words(held)),
            },
            Status::Ready => "the model server is ready".to_owned(),
            Status::Failed(reason) => format!("the model server failed: {reason}"),
            Status::Sleeping => "the model server sleeps until the next request".to_owned(),
            // Told when it is done.
            Status::Stopping => return,
        };
        let elapsed = duration(self.began.elapsed().as_secs_f64() * 1e3);
        self.say(&format!("{elapsed:>9}  {what}"));
    }

    fn now(&self, status: &Status) -> String {
        let gate = &self.stage.gate;
        let (held, in_flight) = (gate.held(), gate.in_flight());
        let what = match status {
            Status::Ready if held + in_flight as usize == 0 => {
                let quiet = gate.demand().since_last_activity().unwrap_or_default();
                let left = self.stage.idle_timeout.get().saturating_sub(quiet).as_secs_f64().ceil();
                format!("no requests; stopped in {left} s")
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
        format!("  {mark} {}  {}", self.paint.bold(status.name()), self.paint.dim(&what))
    }

    fn say(&self, line: &str) {
        match &self.now {
            Some(now) => now.suspend(|| say(line)),
            None => say(line),
        }
    }
}
