//! `scaling.serverQueue`: how many requests wait in the model servers themselves.

use std::{collections::HashMap, future::pending, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::{sync::watch, time::sleep};

use super::{Keeper, speaks};
use crate::probe::fetch;

/// How often the servers are asked. KEDA and the HPA look every 15 to 30 s.
const PERIOD: Duration = Duration::from_secs(2);

/// How long one answer may take, and how long it may be; vLLM's is some 100 KB.
const LIMIT: Duration = Duration::from_secs(1);
const LONGEST: usize = 4 << 20;

/// How many servers are asked at once.
const AT_ONCE: usize = 8;

/// One series for each model that a server serves. Reads 0 for the first seconds after a start.
const METRIC: &str = "vllm:num_requests_waiting";

/// Publishes what waits in the servers, while there is demand and the route wants it. Never ends.
pub(super) async fn run(keeper: &Keeper) {
    let (gate, demand) = (&keeper.gate, keeper.gate.demand());
    let mut tally = keeper.tally.subscribe();
    let mut changes = demand.changes();
    // One that does not answer in time is most likely busy: its last word counts.
    let mut waiting: HashMap<Box<str>, u64> = HashMap::new();
    loop {
        if tally.wait_for(|tally| tally.pods > 0).await.is_err() {
            // The keeper has gone.
            return pending().await;
        }
        // Before the look, so that none is lost.
        changes.mark_unchanged();
        let scaling = gate.policy().scaling;
        if scaling.server_queue && demand.is_active(gate.requests(), scaling.linger.get()) {
            let ready: Vec<_> =
                keeper.pods().endpoints().iter().filter(|pod| pod.is_ready()).cloned().collect();
            waiting.retain(|address, _| ready.iter().any(|pod| pod.address() == &**address));
            let mut answers = stream::iter(ready)
                .map(|pod| async move {
                    let page = fetch(pod.address(), speaks(pod.protocol()), "/metrics", LONGEST, LIMIT).await;
                    page.map(|page| (pod.address().into(), sum(&String::from_utf8_lossy(&page))))
                })
                .buffer_unordered(AT_ONCE);
            while let Some(answer) = answers.next().await {
                waiting.extend(answer);
            }
        } else {
            waiting.clear();
        }
        demand.set_server_queue(waiting.values().sum());
        tokio::select! {
            biased; // at zero nothing waits in servers
            gone = tally.wait_for(|tally| tally.pods == 0) => if gone.is_ok() {
                waiting.clear();
                demand.set_server_queue(0);
            },
            // New policies are a change. Of thousands of routes, those that do not want it cost nothing.
            () = async { if scaling.server_queue { sleep(PERIOD).await } else { changed(&mut changes).await } } => {}
        }
    }
}

async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        // The gate has gone.
        pending().await
    }
}

/// The sum of the metric over its series.
fn sum(page: &str) -> u64 {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(METRIC)?;
        let value = match rest.chars().next()? {
            // The value follows the labels, whatever is quoted in them.
            '{' => rest.rsplit_once('}')?.1,
            ' ' => rest,
            _ => return None,
        };
        value.split_whitespace().next()?.parse::<f64>().ok()
    });
    values.filter(|value| value.is_finite() && *value > 0.0).sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn all_models_count_and_nothing_else_does() {
        let page = "\
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine=\"0\",model_name=\"tiny\"} 3.0
vllm:num_requests_waiting{engine=\"0\",model_name=\"a } b\"} 4.0 1700000000000
vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 100.0
vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 100.0
vllm:num_requests_waiting{model_name=\"broken\"} NaN
vllm:num_requests_waiting{model_name=\"cut off
";
        assert_eq!(sum(page), 7, "3 + 4");
        assert_eq!(sum("vllm:num_requests_waiting 5"), 5, "without labels");
        assert_eq!(sum(""), 0);
    }
}
