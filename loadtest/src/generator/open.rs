//! Open-loop clients: requests arrive on a schedule regardless of earlier responses, and the latency counts from the
//! time the request was due. A server that stalls delays all requests of that time, so the stall shows in the figures.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mio::{Registry, Token};

use super::PROMPT;
use super::client::{ExpectedExchange, ExpectedResponse, LoadClient};
use super::tally::Tally;
use crate::backend::Backend;
use crate::clients::{Clients, MeasuredClients};
use crate::clock::Instant;

/// Part of the schedule that may wait for a free connection. A longer backlog means that the contender cannot sustain
/// the rate.
const BACKLOG: Duration = Duration::from_secs(10);

/// Clients that share connections, and the schedule of their requests.
#[derive(Debug)]
pub(crate) struct OpenLoop {
    target: SocketAddr,
    exchange: Arc<ExpectedExchange>,
    clients: Vec<LoadClient>,
    free: Vec<usize>,
    arrivals: Option<PoissonArrivals>,
    /// Due times of requests waiting for a connection.
    backlog: VecDeque<Instant>,
    waiting: usize,
    rate: u32,
    tally: Tally,
}

/// Independent arrivals at a mean rate (a Poisson process), the same in every measurement.
#[derive(Debug)]
struct PoissonArrivals {
    next: Instant,
    mean: f64,
    random: u64,
}

// === impl OpenLoop ===

impl OpenLoop {
    /// Opens the connections. The first request is due at once; `rate` is in requests per second.
    pub(crate) fn connect(
        registry: &Registry,
        target: SocketAddr,
        connections: usize,
        rate: u32,
    ) -> io::Result<Self> {
        let clients = (0..connections)
            .map(|key| LoadClient::connect(registry, target, Token(key)))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            target,
            exchange: Arc::new(ExpectedExchange::new(PROMPT, ExpectedResponse::Answer)),
            clients,
            free: (0..connections).rev().collect(),
            arrivals: Some(PoissonArrivals::new(Instant::now(), rate)),
            backlog: VecDeque::new(),
            waiting: 0,
            rate,
            tally: Tally::new(),
        })
    }

    fn send(&mut self) -> usize {
        let mut sent = 0;
        while let Some(&due) = self.backlog.front()
            && let Some(key) = self.free.pop()
        {
            self.backlog.pop_front();
            self.waiting += 1;
            sent += 1;
            if let Err(why) = self.clients[key].send(&self.exchange, due) {
                self.tally.fail(why);
            }
        }
        sent
    }
}

impl MeasuredClients for OpenLoop {
    fn finish(&mut self) {
        self.arrivals = None;
    }

    fn waiting(&self) -> usize {
        self.waiting + self.backlog.len()
    }

    fn tally(&self) -> &Tally {
        &self.tally
    }

    fn reset(&mut self) {
        self.tally.reset();
    }
}

impl Clients for OpenLoop {
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
        if let Some(due) = client.sent.take() {
            self.waiting -= 1;
            self.free.push(key);
            self.tally.answer(due.elapsed());
        }
        if let Err(why) = answered {
            self.tally.fail(why);
            self.clients[key] = LoadClient::connect(registry, self.target, token)?;
        }
        Ok(())
    }

    fn on_turn(&mut self, _backend: &mut Backend) -> io::Result<usize> {
        if let Some(arrivals) = &mut self.arrivals {
            let now = Instant::now();
            while let Some(due) = arrivals.due(now) {
                self.backlog.push_back(due);
            }
            if self.backlog.front().is_some_and(|due| now.saturating_duration_since(*due) > BACKLOG) {
                self.tally.fail(format!(
                    "{} requests/s are more than the contender sustains: pass a lower --rate",
                    self.rate
                ));
                self.backlog.clear();
                self.arrivals = None;
            }
        }
        Ok(self.send())
    }
}

// === impl PoissonArrivals ===

impl PoissonArrivals {
    fn new(first: Instant, rate: u32) -> Self {
        Self { next: first, mean: 1.0 / f64::from(rate), random: 0x2545_f491_4f6c_dd1d }
    }

    /// Returns the time of the next arrival, if it is due.
    fn due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.next;
        if due > now {
            return None;
        }
        // xorshift64; its upper 53 bits as a number above 0 and at most 1.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let uniform = ((self.random >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        self.next += Duration::from_secs_f64(-uniform.ln() * self.mean);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_match_rate_with_uneven_spacing() {
        let start = Instant::now();
        let mut arrivals = PoissonArrivals::new(start, 1000);
        let due: Vec<_> = std::iter::from_fn(|| arrivals.due(start + Duration::from_secs(10))).collect();
        // 10,000 are expected, with a standard deviation of 100.
        assert!((9_500..10_500).contains(&due.len()), "{}", due.len());
        assert!(due.is_sorted());
        // Of exponentially distributed gaps, 1 - 1/e = 63 % are shorter than the mean.
        let short = due.windows(2).filter(|pair| pair[1] - pair[0] < Duration::from_millis(1)).count();
        assert!((0.60..0.66).contains(&(short as f64 / due.len() as f64)), "{short} of {}", due.len());
    }

    #[test]
    fn nothing_arrives_before_it_is_due() {
        let start = Instant::now();
        let mut arrivals = PoissonArrivals::new(start + Duration::from_secs(1), 10);
        assert_eq!(arrivals.due(start), None);
        assert_eq!(arrivals.due(start + Duration::from_secs(1)), Some(start + Duration::from_secs(1)));
    }
}
