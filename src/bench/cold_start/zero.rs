//! Waiting for the route to scale to zero.

use std::{process::Stdio, time::Duration};

use tokio::{
    process::Command,
    time::{Instant, sleep, timeout_at},
};

use super::admin::AdminApis;

/// Brings the route to zero.
#[derive(Clone, Debug)]
pub(super) struct ZeroWait {
    /// Shell command, run once per cycle if the route is not at zero.
    pub(super) stop_command: Option<String>,
    pub(super) timeout: Duration,
}

/// Interval between queries of the admin APIs.
const ZERO_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Time for which an admin API may be unreachable, so that a port-forward can be restarted.
const UNREACHABLE_TOLERANCE: Duration = Duration::from_secs(15);

// === impl ZeroWait ===

impl ZeroWait {
    /// Waits until the route is at zero on all replicas. Reports progress to `show`.
    ///
    /// # Errors
    /// On timeout, with the remedy, or if an admin API stays unreachable.
    pub(super) async fn wait(&self, admins: &AdminApis, mut show: impl FnMut(String)) -> Result<(), String> {
        let deadline = Instant::now() + self.timeout;
        let mut stopped = false;
        let mut unreachable_since: Option<Instant> = None;
        loop {
            match admins.route().await {
                Ok(route) if route.is_at_zero() => return Ok(()),
                Ok(route) => {
                    unreachable_since = None;
                    show(format!("waiting for zero: {}", route.description()));
                    if let Some(command) = self.stop_command.as_deref().filter(|_| !stopped) {
                        show("running the --stop-command".to_owned());
                        stop(command, deadline).await?;
                        stopped = true;
                    }
                    if Instant::now() >= deadline {
                        return Err(self.timeout_error(&route.description(), &admins.route));
                    }
                }
                Err(error) => {
                    if unreachable_since.get_or_insert_with(Instant::now).elapsed() > UNREACHABLE_TOLERANCE {
                        return Err(error);
                    }
                    show(error);
                }
            }
            sleep(ZERO_POLL_INTERVAL).await;
        }
    }

    fn timeout_error(&self, state: &str, route: &str) -> String {
        let timeout = humantime::format_duration(self.timeout);
        let remedy = match self.stop_command {
            Some(_) => "the --stop-command ran but did not stop the target",
            None => {
                "it scales down after its idle timeout (KEDA: cooldownPeriod) without a request; shorten that, raise \
                 --timeout, or stop the target with --stop-command"
            }
        };
        format!("route {route} is not at zero after {timeout} ({state}): {remedy}")
    }
}

async fn stop(command: &str, deadline: Instant) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout_at(deadline, shell.output()).await;
    let output = output
        .map_err(|_| "the --stop-command did not end within --timeout".to_owned())?
        .map_err(|error| format!("cannot run the --stop-command: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr = stderr.trim().lines().last().unwrap_or("no output").to_owned();
    Err(format!("the --stop-command failed ({}): {stderr}", output.status))
}
