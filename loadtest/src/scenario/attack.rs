//! The attack scenario: a well-behaved client beside a malicious one. Each round first measures the client alone,
//! with the same process.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::warm::accept;
use crate::attacker::{Attack, Attacker};
use crate::contender::Contender;
use crate::descriptors::ClientLimit;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, noise};
use crate::generator::open::OpenLoop;
use crate::procfs::Meter;
use crate::rig::{Measurement, MeasurementPlan, Rig};
use crate::setup::Setup;
use crate::spread::Spread;

/// Requests per second of the well-behaved client; they leave most of the core to the attacker.
const CLIENT_REQUESTS_PER_SEC: u32 = 2000;
const CLIENT_CONNECTIONS: usize = 64;
/// Maximum p99 under attack, as a multiple of the p99 without.
const MAX_P99_FACTOR: f64 = 5.0;
/// Time between the start of an attack and the measurement, long enough for the attacker to open all connections.
const ATTACK_RAMP_UP: Duration = Duration::from_millis(2500);

/// Observations of the client in one round.
#[derive(Clone, Copy, Debug, Serialize)]
struct AttackRound {
    attack: &'static str,
    alone_p50_us: f64,
    alone_p99_us: f64,
    beside_p50_us: f64,
    beside_p99_us: f64,
    /// Connections that the attacker opened.
    opened: u64,
    others: f64,
}

pub(crate) fn run(setup: &Setup) -> Result<Findings, LoadtestError> {
    ClientLimit::from_raised_limit()?;
    let rounds = setup.rounds();
    let duration = setup.duration(Duration::from_millis(500), Duration::from_secs(4));
    let installed = setup.anteroom()?;
    let name = Contender::Anteroom.name();
    let mut rig = Rig::new(setup.stop.clone())?;
    let mut seen = Vec::new();
    for round in 1..=rounds {
        for attack in Attack::ALL {
            eprintln!("attack, round {round} of {rounds}: {}", attack.name());
            let template = include_str!("../../contenders/attack.yaml");
            let mut running = installed.start_with(template, rig.backend(), setup.cores)?;
            rig.await_answer(name, &mut running)?;
            let meter =
                Meter { cores: setup.cores, contender: running.process.as_ref().map(|process| process.id()) };
            let address = running.address;
            let mut measure = |rig: &mut Rig| {
                let plan =
                    MeasurementPlan { connections: CLIENT_CONNECTIONS, warm_up: duration / 4, duration };
                OpenLoop::connect(rig.registry(), address, CLIENT_CONNECTIONS, CLIENT_REQUESTS_PER_SEC)
                    .map_err(|error| LoadtestError::io("connect", error))
                    .and_then(|mut load| rig.measure_load(&mut load, plan, meter))
                    .and_then(|sample| accept(sample, Contender::Anteroom, CLIENT_CONNECTIONS))
                    .map_err(|error| running.explain(name, error))
            };
            let alone = measure(&mut rig)?;
            let attacker = Attacker::start(attack, address, setup.cores.attacker);
            rig.run(None, ATTACK_RAMP_UP)?;
            let beside = measure(&mut rig)?;
            seen.push(AttackRound::new(attack, &alone, &beside, attacker.end()?));
        }
    }
    let core = match setup.cores.attacker == setup.cores.rig {
        true => "on the client's core, which it slows down, too",
        false => "on a core of its own",
    };
    let how = format!(
        "{rounds} rounds of {} s for each attack; {CLIENT_REQUESTS_PER_SEC} requests a second by schedule over {CLIENT_CONNECTIONS} connections, with \
         64 MiB for all bodies; the attacker {core}",
        duration.as_secs_f64()
    );
    Ok(findings(how, &seen))
}

// === impl AttackRound ===

impl AttackRound {
    fn new(attack: Attack, alone: &Measurement, beside: &Measurement, opened: u64) -> Self {
        let us = |latency: Duration| latency.as_secs_f64() * 1e6;
        Self {
            attack: attack.name(),
            alone_p50_us: us(alone.p50),
            alone_p99_us: us(alone.p99),
            beside_p50_us: us(beside.p50),
            beside_p99_us: us(beside.p99),
            opened,
            // During the attack, other load includes the attacker itself.
            others: alone.spent.others.as_secs_f64() / alone.elapsed.as_secs_f64(),
        }
    }

    fn ratio(&self) -> f64 {
        self.beside_p99_us / self.alone_p99_us
    }
}

fn findings(how: String, seen: &[AttackRound]) -> Findings {
    let mut rows = Vec::new();
    let mut aims = Vec::new();
    for attack in Attack::ALL {
        let of = |figure: fn(&AttackRound) -> f64| {
            let rounds = seen.iter().filter(|seen| seen.attack == attack.name());
            Spread::of(rounds.map(figure)).unwrap_or_default()
        };
        let ratio = of(AttackRound::ratio);
        rows.push(vec![
            attack.name().to_owned(),
            format!(
                "{:.0} / {:.0}",
                of(|seen| seen.alone_p50_us).median,
                of(|seen| seen.alone_p99_us).median
            ),
            format!(
                "{:.0} / {:.0}",
                of(|seen| seen.beside_p50_us).median,
                of(|seen| seen.beside_p99_us).median
            ),
            format!("{:.2} ({:.2}–{:.2})", ratio.median, ratio.min, ratio.max),
        ]);
        aims.push(Criterion::at_most(
            attack.name(),
            "times the p99 of a client alone, at most",
            MAX_P99_FACTOR,
            ratio.median,
        ));
    }
    let header = ["beside", "µs alone, p50 / p99", "beside it", "p99, times"];
    Findings {
        scenario: "attack",
        how,
        tables: vec![Table {
            title: String::new(),
            header: header.map(str::to_owned).into(),
            rows,
            legend: Some(
                "from when a request was due; all requests are answered, or the run ends with an error",
            ),
        }],
        results: json!({ "rounds": seen }),
        aims,
        notes: noise(seen.iter().map(|seen| (seen.attack.to_owned(), seen.others))).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_attack_has_an_aim_of_its_own() {
        let seen = |attack: Attack, beside_p99_us: f64| AttackRound {
            attack: attack.name(),
            alone_p50_us: 50.0,
            alone_p99_us: 100.0,
            beside_p50_us: 60.0,
            beside_p99_us,
            opened: 1,
            others: 0.0,
        };
        let all = [
            seen(Attack::Heads, 100.0),
            seen(Attack::Heads, 400.0),
            seen(Attack::Heads, 500.0),
            seen(Attack::Unread, 510.0),
            seen(Attack::Bodies, 500.0),
        ];
        let found = findings("so".into(), &all);
        let aims: Vec<_> = found.aims.iter().map(|aim| (aim.measured, aim.met)).collect();
        assert_eq!(aims, [(4.0, true), (5.1, false), (5.0, true)]);
        assert_eq!(found.tables[0].rows[0][3], "4.00 (1.00–5.00)");
    }
}
