//! Waits until nothing runs for the route.

use std::{process::Stdio, time::Duration};

use tokio::{
    process::Command,
    time::{Instant, sleep, timeout_at},
};

use super::admin::Admins;

/// How a route gets to zero.
#[derive(Clone, Debug)]
pub(super) struct Zero {
    /// Run by a shell when the route is not at zero.
    pub(super) stop_command: Option<String>,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);

/// How long an admin API that answered before may be away: a port-forward may have to be made anew.
const AWAY: Duration = Duration::from_secs(15);

// === impl Zero ===

impl Zero {
    /// Returns when the route is at zero, as all replicas see it. `show` is told what is waited for.
    ///
    /// # Errors
    /// A sentence with the way out, when that takes too long or cannot be found out.
    pub(super) async fn wait(&self, admins: &Admins, mut show: impl FnMut(String)) -> Result<(), String> {
        let deadline = Instant::now() + self.limit;
        let mut stopped = false;
        let mut away: Option<Instant> = None;
        loop {
            match admins.route().await {
                Ok(route) if route.is_at_zero() => return Ok(()),
                Ok(route) => {
                    away = None;
                    show(format!("waits for zero: {}", route.words()));
                    if let Some(command) = self.stop_command.as_deref().filter(|_| !stopped) {
                        show("runs the --stop-command".to_owned());
                        stop(command, deadline).await?;
                        stopped = true;
                    }
                    if Instant::now() >= deadline {
                        return Err(self.too_late(&route.words(), &admins.route));
                    }
                }
                Err(error) => {
                    if away.get_or_insert_with(Instant::now).elapsed() > AWAY {
                        return Err(error);
                    }
                    show(error);
                }
            }
            sleep(LOOK).await;
        }
    }

    fn too_late(&self, words: &str, route: &str) -> String {
        let limit = humantime::format_duration(self.limit);
        let way_out = match self.stop_command {
            Some(_) => "the --stop-command has run, but did not bring it there",
            None => {
                "it gets there when it has had no request for its idle timeout (KEDA: cooldownPeriod); make that \
                 shorter, give a longer --timeout, or say with --stop-command what stops it"
            }
        };
        format!("route {route} is not at zero after {limit} ({words}): {way_out}")
    }
}

async fn stop(command: &str, deadline: Instant) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout_at(deadline, shell.output()).await;
    let output = output
        .map_err(|_| "the --stop-command did not end within --timeout".to_owned())?
        .map_err(|error| format!("the --stop-command cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or("it said nothing").to_owned();
    Err(format!("the --stop-command failed ({}): {said}", output.status))
}
