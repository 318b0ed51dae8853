//! Image pull and creation of a container: durations from the pod's annotations, messages as in the kubelet.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use serde_json::json;
use tokio::time::sleep;

use super::{
    FIRST_POD_HOST_NUMBER,
    container::{Task, state},
    fate::{self, PodFailure},
    history::NodeEventKind,
    volumes::Files,
};

/// Size of every image, in bytes.
const IMAGE_SIZE: u64 = 10_737_418_240;

// === impl Task ===

impl Task {
    /// Prepares the container up to the point where it can be started.
    pub(super) async fn prepare(&mut self) {
        self.files = Files::mount(&self.agent, &self.pod, &self.container, self.address).await;
        self.pull().await;
        sleep(self.given(fate::START_DELAY_ANNOTATION).unwrap_or_default()).await;
        self.event("Normal", "Created", "Container created");
    }

    /// Returns a duration of the pod's annotations.
    pub(super) fn given(&self, annotation: &str) -> Option<Duration> {
        let [.., last] = self.address.octets();
        fate::given(&self.pod, annotation, usize::from(last - FIRST_POD_HOST_NUMBER))
    }

    async fn pull(&mut self) {
        let image = self.status.image.clone();
        let mut failures = 0;
        while self.requested_failure() == Some(PodFailure::ImagePullBackOff) {
            let failed = format!("failed to pull and unpack image \"{image}\": not found");
            self.event("Normal", "Pulling", &format!("Pulling image \"{image}\""));
            self.status.state =
                Some(state("waiting", json!({ "reason": "ErrImagePull", "message": failed })));
            self.report();
            self.event("Warning", "Failed", &format!("Failed to pull image \"{image}\": {failed}"));
            self.event("Warning", "Failed", "Error: ErrImagePull");
            // About the time until the kubelet handles the pod again.
            sleep(Duration::from_millis(100)).await;
            let delay = self.delay(failures);
            let message = format!("Back-off pulling image \"{image}\": ErrImagePull: {failed}");
            self.event("Normal", "BackOff", &format!("Back-off pulling image \"{image}\""));
            self.event("Warning", "Failed", "Error: ImagePullBackOff");
            self.status.state =
                Some(state("waiting", json!({ "reason": "ImagePullBackOff", "message": message })));
            self.report();
            sleep(delay).await;
            failures += 1;
        }
        let takes = self.given(fate::PULL_DELAY_ANNOTATION);
        if let Some(takes) = takes {
            let began = self.agent.note(&self.pod, NodeEventKind::Pulling);
            self.status.state = Some(state("waiting", json!({ "reason": "ContainerCreating" })));
            self.report();
            self.event_at(began, "Normal", "Pulling", &format!("Pulling image \"{image}\""));
            sleep(takes).await;
            let ended = self.agent.note(&self.pod, NodeEventKind::Pulled);
            let took = took(began, ended);
            let message = format!(
                "Successfully pulled image \"{image}\" in {took} ({took} including waiting). Image size: {IMAGE_SIZE} \
                 bytes."
            );
            self.event_at(ended, "Normal", "Pulled", &message);
        } else {
            let at = self.agent.note(&self.pod, NodeEventKind::Pulled);
            let message = format!(
                "Container image \"{image}\" already present on machine and can be accessed by the pod"
            );
            self.event_at(at, "Normal", "Pulled", &message);
        }
        self.status.image_id = format!("{image}@here");
    }
}

fn took(from: SystemTime, to: SystemTime) -> String {
    go_duration(to.duration_since(from).unwrap_or_default())
}

/// Formats a duration like Go, truncated to milliseconds.
fn go_duration(duration: Duration) -> String {
    let (minutes, millis) = (duration.as_secs() / 60, duration.as_millis() % 60_000);
    let mut text = String::new();
    match (minutes, millis) {
        (0, 0) => return "0s".into(),
        (0, 1..1000) => return format!("{millis}ms"),
        (0, _) => {}
        (..60, _) => write!(text, "{minutes}m").unwrap(),
        _ => write!(text, "{}h{}m", minutes / 60, minutes % 60).unwrap(),
    }
    let seconds = format!("{}.{:03}", millis / 1000, millis % 1000);
    text + seconds.trim_end_matches('0').trim_end_matches('.') + "s"
}
