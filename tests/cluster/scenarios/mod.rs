//! The scenarios.

mod harness;

use crate::runner::Entry;

/// Names a list of scenarios: each is an `async fn(Scenario)` of a module here.
macro_rules! scenarios {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$(Entry {
            name: concat!(stringify!($module), "::", stringify!($name)),
            run: |scenario| Box::pin($module::$name(scenario)),
        }),*]
    };
}

/// Those that leave the cluster as it is: a few run at the same time.
pub(crate) const TOGETHER: &[Entry] = scenarios![harness::a_push_scales_from_zero_and_silence_back_to_it,];

/// Those that break something that others need: they run last, one by one.
pub(crate) const ALONE: &[Entry] = scenarios![];
