//! The scenarios: what each measures is in its own file.

mod warm;

use crate::cli;
use crate::error::Error;
use crate::findings::Findings;
use crate::setup::Setup;

pub(crate) type Run<'a> = Box<dyn FnOnce(&Setup) -> Result<Findings, Error> + 'a>;

/// What the command line asks for, in its order.
pub(crate) fn of(scenario: &cli::Scenario) -> Vec<Run<'_>> {
    match scenario {
        cli::Scenario::All(_) => vec![Box::new(|setup| warm::run(setup, &warm::CONNECTIONS))],
        cli::Scenario::Warm(options) => vec![Box::new(|setup| warm::run(setup, &options.connections))],
    }
}
