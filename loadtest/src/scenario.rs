//! The scenarios, one per file.

mod attack;
mod body;
mod hangup;
mod held;
mod overflow;
mod release;
mod routes;
mod signal;
mod soak;
mod stream;
mod warm;

use crate::cli;
use crate::error::Error;
use crate::findings::Findings;
use crate::setup::Setup;

pub(crate) type Run<'a> = Box<dyn FnOnce(&Setup) -> Result<Findings, Error> + 'a>;

/// Returns the scenarios requested on the command line, in their order.
pub(crate) fn of(scenario: &cli::Scenario) -> Vec<Run<'_>> {
    match scenario {
        cli::Scenario::All(_) => vec![
            Box::new(|setup| warm::run(setup, &warm::CONNECTIONS, cli::DEFAULT_RATE)),
            Box::new(body::run),
            Box::new(|setup| stream::run(setup, cli::DEFAULT_STREAMS)),
            Box::new(|setup| held::run(setup, None)),
            Box::new(|setup| release::run(setup, None)),
            Box::new(signal::run),
            Box::new(|setup| overflow::run(setup, None)),
            Box::new(|setup| hangup::run(setup, None)),
            Box::new(attack::run),
            Box::new(|setup| routes::run(setup, routes::ROUTES)),
            Box::new(soak::run),
        ],
        cli::Scenario::Warm(options) => {
            vec![Box::new(|setup| warm::run(setup, &options.connections, options.rate))]
        }
        cli::Scenario::Body(_) => vec![Box::new(body::run)],
        cli::Scenario::Stream(options) => vec![Box::new(|setup| stream::run(setup, options.streams))],
        cli::Scenario::Attack(_) => vec![Box::new(attack::run)],
        cli::Scenario::Soak(_) => vec![Box::new(soak::run)],
        cli::Scenario::Signal(_) => vec![Box::new(signal::run)],
        cli::Scenario::Routes(options) => vec![Box::new(|setup| routes::run(setup, options.routes.into()))],
        cli::Scenario::Held(crowd) => vec![Box::new(|setup| held::run(setup, crowd.requests()))],
        cli::Scenario::Release(crowd) => vec![Box::new(|setup| release::run(setup, crowd.requests()))],
        cli::Scenario::Overflow(crowd) => vec![Box::new(|setup| overflow::run(setup, crowd.requests()))],
        cli::Scenario::Hangup(crowd) => vec![Box::new(|setup| hangup::run(setup, crowd.requests()))],
    }
}
