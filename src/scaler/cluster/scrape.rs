//! `scaling.serverQueue`: scrapes the queues of the model servers, and widens the ramps of those that run all they were sent.

use std::{collections::HashMap, future::pending, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::{sync::watch, time::sleep};

use super::keeper::{Keeper, probe_protocol_of};
use crate::{admission::Gate, probe::fetch, state::Endpoint};

/// Interval of scrapes. KEDA and the HPA poll every 15 to 30 s.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(2);

const SCRAPE_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum size of a page of metrics, in bytes. vLLM's page has about 100 KB.
const MAX_PAGE_BYTES: usize = 4 << 20;

/// Maximum number of concurrent scrapes of a target.
const MAX_SCRAPES: usize = 8;

/// Requests in a server's queue: one series per model. Reads 0 for the first seconds after a start.
const WAITING_METRIC: &str = "vllm:num_requests_waiting";

/// Requests that a server runs: one series per model.
const RUNNING_METRIC: &str = "vllm:num_requests_running";

/// Publishes the length of the servers' queues, while there is demand and the policy uses it. Never returns.
pub(super) async fn run(keeper: &Keeper) {
    let (gate, demand) = (&keeper.gate, keeper.gate.demand());
    let mut counts = keeper.counts.subscribe();
    let mut changes = demand.changes();
    // A server that does not answer in time keeps its last value: it is most likely busy.
    let mut waiting: HashMap<Box<str>, u64> = HashMap::new();
    loop {
        if counts.wait_for(|counts| counts.pods > 0).await.is_err() {
            // The keeper was dropped.
            return pending().await;
        }
        // Changes are marked before the demand is read, so that none is lost.
        changes.mark_unchanged();
        let scaling = gate.policy().scaling;
        if scaling.server_queue && demand.is_active(gate.requests(), scaling.linger.get()) {
            let ready: Vec<_> =
                keeper.pods().endpoints().iter().filter(|pod| pod.is_ready()).cloned().collect();
            waiting.retain(|address, _| ready.iter().any(|pod| pod.address() == &**address));
            let mut answers = stream::iter(ready)
                .map(|pod| async move {
                    let page = fetch(
                        pod.address(),
                        probe_protocol_of(pod.protocol()),
                        "/metrics",
                        MAX_PAGE_BYTES,
                        SCRAPE_TIMEOUT,
                    )
                    .await;
                    page.map(|page| {
                        let page = String::from_utf8_lossy(&page);
                        widen_if_all_run(gate, &pod, &page);
                        (pod.address().into(), sum_of_metric(WAITING_METRIC, &page))
                    })
                })
                .buffer_unordered(MAX_SCRAPES);
            while let Some(answer) = answers.next().await {
                waiting.extend(answer);
            }
        } else {
            waiting.clear();
        }
        demand.set_server_queue(waiting.values().sum());
        tokio::select! {
            biased; // without pods there is no queue
            gone = counts.wait_for(|counts| counts.pods == 0) => if gone.is_ok() {
                waiting.clear();
                demand.set_server_queue(0);
            },
            // A new policy publishes a change, so routes without `serverQueue` need no timer.
            () = async { if scaling.server_queue { sleep(SCRAPE_INTERVAL).await } else { changed(&mut changes).await } } => {}
        }
    }
}

async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        // The gate was dropped.
        pending().await
    }
}

/// Widens the ramp of a pod that runs every request it has been sent, while others are held.
fn widen_if_all_run(gate: &Gate, pod: &Endpoint, page: &str) {
    let sent = u64::from(pod.in_flight());
    if sent > 0 && gate.held() > 0 && sum_of_metric(RUNNING_METRIC, page) >= sent {
        gate.target().widen(pod);
    }
}

/// Sums a metric over its series.
fn sum_of_metric(metric: &str, page: &str) -> u64 {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(metric)?;
        let value = match rest.chars().next()? {
            // The value follows the last brace, as labels may contain others.
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
    use super::*;
    use crate::{coldstart::ColdStarts, domain::Policy, hold::ReleaseOutcome};

    #[tokio::test]
    async fn ramp_widens_if_all_requests_run() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let pod = Endpoint::new("10.0.0.1:8000", 64);
        gate.target().add(&pod);
        let mut tickets: Vec<_> = (0..12).map(|_| gate.hold(1, true).unwrap()).collect();
        gate.target().ready(&pod, Some(4));
        let mut permits = Vec::new();
        for (running, in_flight) in [(0, 4), (3, 4), (4, 8), (7, 8), (9, 12), (12, 12)] {
            widen_if_all_run(&gate, &pod, &format!("vllm:num_requests_running{{}} {running}.0"));
            assert_eq!((pod.in_flight(), gate.held()), (in_flight, 12 - in_flight as usize), "{running}");
            while permits.len() < in_flight as usize {
                let ReleaseOutcome::Dispatch(permit) = tickets.remove(0).released().await else {
                    panic!("refused")
                };
                permits.push(permit);
            }
        }
    }

    #[test]
    fn sum_covers_all_models_and_no_other_metric() {
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
        assert_eq!(sum_of_metric(WAITING_METRIC, page), 7, "3 + 4");
        assert_eq!(sum_of_metric(RUNNING_METRIC, page), 100);
        assert_eq!(sum_of_metric(WAITING_METRIC, "vllm:num_requests_waiting 5"), 5, "without labels");
        assert_eq!(sum_of_metric(WAITING_METRIC, ""), 0);
    }
}
