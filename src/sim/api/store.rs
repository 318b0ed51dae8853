//! Stored responses of the Responses API.

use super::answer::{ApiError, SimResponse, json};
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{HashMap, VecDeque};
use tokio_util::task::AbortOnDropHandle;

/// Number of stored responses; the oldest is evicted.
const MAX_STORED_RESPONSES: usize = 1024;

/// Responses by id.
#[derive(Default)]
pub(in crate::sim) struct ResponseStore(Mutex<StoredResponses>);

#[derive(Default)]
struct StoredResponses {
    by_id: HashMap<String, StoredResponse>,
    oldest_first: VecDeque<String>,
}

struct StoredResponse {
    body: Value,
    /// Generation of a background response. Dropping it ends the generation.
    task: Option<AbortOnDropHandle<()>>,
}

// === impl ResponseStore ===

impl ResponseStore {
    pub(super) fn get(&self, id: &str) -> Result<SimResponse, ApiError> {
        let entries = self.0.lock();
        Ok(json(&entries.by_id.get(id).ok_or_else(|| not_found(id))?.body))
    }

    pub(super) fn cancel(&self, id: &str) -> Result<SimResponse, ApiError> {
        let mut entries = self.0.lock();
        let entry = entries.by_id.get_mut(id).ok_or_else(|| not_found(id))?;
        if entry.body["status"] != "queued" {
            let message = "Cannot cancel a synchronous response.";
            return Err(invalid(StatusCode::BAD_REQUEST, message.to_owned()));
        }
        entry.body["status"] = json!("cancelled");
        entry.task = None;
        Ok(json(&entry.body))
    }

    /// Drops all responses and ends background generations.
    pub(in crate::sim) fn clear(&self) {
        self.0.lock().by_id.clear();
    }

    pub(super) fn put(&self, id: &str, body: Value) {
        let mut entries = self.0.lock();
        if let Some(entry) = entries.by_id.get_mut(id) {
            // A response cancelled concurrently stays cancelled.
            if entry.body["status"] == "queued" {
                *entry = StoredResponse { body, task: None };
            }
            return;
        }
        entries.by_id.insert(id.to_owned(), StoredResponse { body, task: None });
        entries.oldest_first.push_back(id.to_owned());
        if entries.oldest_first.len() > MAX_STORED_RESPONSES
            && let Some(oldest) = entries.oldest_first.pop_front()
        {
            entries.by_id.remove(&oldest);
        }
    }

    pub(super) fn attach(&self, id: &str, task: AbortOnDropHandle<()>) {
        if let Some(entry) = self.0.lock().by_id.get_mut(id) {
            entry.task = Some(task);
        }
    }
}

fn not_found(id: &str) -> ApiError {
    invalid(StatusCode::NOT_FOUND, format!("Response with id '{id}' not found."))
}

fn invalid(status: StatusCode, message: String) -> ApiError {
    ApiError { status, kind: "invalid_request_error", param: Some("response_id"), message }
}
