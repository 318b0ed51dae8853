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
use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::setup::Setup;

pub(crate) type ScenarioFn<'a> = Box<dyn FnOnce(&Setup) -> Result<Findings, LoadtestError> + 'a>;

/// Returns the scenarios requested on the command line, in their order.
pub(crate) fn of(scenario: &cli::ScenarioCommand) -> Vec<ScenarioFn<'_>> {
    match scenario {
        cli::ScenarioCommand::All(_) => vec![
            Box::new(|setup| warm::run(setup, &warm::DEFAULT_CONNECTIONS, cli::DEFAULT_RATE)),
            Box::new(body::run),
            Box::new(|setup| stream::run(setup, cli::DEFAULT_STREAMS)),
            Box::new(|setup| held::run(setup, None)),
            Box::new(|setup| release::run(setup, None)),
            Box::new(signal::run),
            Box::new(|setup| overflow::run(setup, None)),
            Box::new(|setup| hangup::run(setup, None)),
            Box::new(attack::run),
            Box::new(|setup| routes::run(setup, routes::DEFAULT_ROUTES)),
            Box::new(soak::run),
        ],
        cli::ScenarioCommand::Warm(options) => {
            vec![Box::new(|setup| warm::run(setup, &options.connections, options.rate))]
        }
        cli::ScenarioCommand::Body(_) => vec![Box::new(body::run)],
        cli::ScenarioCommand::Stream(options) => vec![Box::new(|setup| stream::run(setup, options.streams))],
        cli::ScenarioCommand::Attack(_) => vec![Box::new(attack::run)],
        cli::ScenarioCommand::Soak(_) => vec![Box::new(soak::run)],
        cli::ScenarioCommand::Signal(_) => vec![Box::new(signal::run)],
        cli::ScenarioCommand::Routes(options) => {
            vec![Box::new(|setup| routes::run(setup, options.routes.into()))]
        }
        cli::ScenarioCommand::Held(crowd) => vec![Box::new(|setup| held::run(setup, crowd.requests()))],
        cli::ScenarioCommand::Release(crowd) => vec![Box::new(|setup| release::run(setup, crowd.requests()))],
        cli::ScenarioCommand::Overflow(crowd) => {
            vec![Box::new(|setup| overflow::run(setup, crowd.requests()))]
        }
        cli::ScenarioCommand::Hangup(crowd) => vec![Box::new(|setup| hangup::run(setup, crowd.requests()))],
    }
}
