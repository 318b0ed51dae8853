//! Closed-loop clients: each has one connection with one request in flight, and sends the next request as soon as the
//! response is complete. That measures throughput; the latencies are those at full load.

pub(crate) mod client;
pub(crate) mod h2;
pub(crate) mod open;
pub(crate) mod streams;
pub(crate) mod tally;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use mio::{Registry, Token};

use crate::clients::{Clients, MeasuredClients};
use crate::clock::Instant;
use client::{ExpectedExchange, ExpectedResponse, LoadClient};
use tally::Tally;

/// Request body: a short chat of about 300 bytes, with the model name after the messages as SDKs send it.
pub(crate) const PROMPT: &str = concat!(
    r#"{"messages":[{"role":"system","content":"You are a helpful assistant. Answer in one short sentence."},"#,
    r#"{"role":"user","content":"Hello! Which planet of our solar system has the shortest day, and how long is it?"}],"#,
    r#""model":"tiny","max_tokens":64,"temperature":0.7,"top_p":0.95,"stream":false,"user":"loadtest"}"#
);

/// Clients of one measurement and the tally of their results.
#[derive(Debug)]
pub(crate) struct ClosedLoop {
    target: SocketAddr,
    exchange: Arc<ExpectedExchange>,
    clients: Vec<LoadClient>,
    /// Requests that may still be started.
    budget: u64,
    waiting: usize,
    tally: Tally,
}

// === impl ClosedLoop ===

impl ClosedLoop {
    /// Opens the connections, with [`PROMPT`] as the request; `start` sends the first requests.
    pub(crate) fn connect(registry: &Registry, target: SocketAddr, connections: usize) -> io::Result<Self> {
        Self::with(
            registry,
            target,
            connections,
            Arc::new(ExpectedExchange::new(PROMPT, ExpectedResponse::Answer)),
        )
    }

    /// Like [`Self::connect`], with another request.
    pub(crate) fn with(
        registry: &Registry,
        target: SocketAddr,
        connections: usize,
        exchange: Arc<ExpectedExchange>,
    ) -> io::Result<Self> {
        let clients = (0..connections)
            .map(|key| LoadClient::connect(registry, target, Token(key)))
            .collect::<io::Result<_>>()?;
        Ok(Self { target, exchange, clients, budget: 0, waiting: 0, tally: Tally::new() })
    }

    /// Lets every client send until `requests` have been started.
    pub(crate) fn start(&mut self, requests: u64) {
        self.budget = requests;
        let now = Instant::now();
        for key in 0..self.clients.len() {
            if self.clients[key].sent.is_none() {
                self.next(key, now);
            }
        }
    }

    fn next(&mut self, key: usize, now: Instant) {
        if self.budget == 0 {
            return;
        }
        self.budget -= 1;
        self.waiting += 1;
        if let Err(why) = self.clients[key].send(&self.exchange, now) {
            // An event for the end of the connection follows.
            self.tally.fail(why);
        }
    }
}

impl MeasuredClients for ClosedLoop {
    fn finish(&mut self) {
        self.budget = 0;
    }

    fn waiting(&self) -> usize {
        self.waiting
    }

    fn tally(&self) -> &Tally {
        &self.tally
    }

    fn reset(&mut self) {
        self.tally.reset();
    }
}

impl Clients for ClosedLoop {
    fn must_abandon(&self) -> bool {
        self.tally.is_unrecoverable()
    }

    fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let key = token.0;
        let client = &mut self.clients[key];
        let answered = match client.proceed(&self.exchange) {
            Ok(false) => return Ok(()),
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        let now = Instant::now();
        if let Some(sent) = client.sent.take() {
            self.waiting -= 1;
            self.tally.answer(now - sent);
        }
        if let Err(why) = answered {
            self.tally.fail(why);
            if self.must_abandon() {
                self.budget = 0;
            }
            self.clients[key] = LoadClient::connect(registry, self.target, token)?;
        }
        self.next(key, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_small_and_names_its_model() {
        let prompt: serde_json::Value = serde_json::from_str(PROMPT).unwrap();
        assert_eq!(prompt["model"], "tiny");
        assert!((280..320).contains(&PROMPT.len()), "{}", PROMPT.len());
    }
}
