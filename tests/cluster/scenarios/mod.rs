//! The scenarios.

mod harness;
mod node;
mod outage;

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
pub(crate) const TOGETHER: &[Entry] = scenarios![
    harness::a_push_scales_from_zero_and_silence_back_to_it,
    harness::replicas_of_anteroom_run_with_the_rights_of_the_chart,
    harness::envoy_says_503_at_zero_and_passes_on_once_a_pod_is_ready,
    node::a_missing_image_backs_off_until_it_is_there,
    node::a_container_that_exits_is_started_again_ever_later,
    node::a_container_that_is_out_of_memory_says_so,
    node::a_pod_that_fits_nowhere_waits_for_a_node,
    node::a_pod_ends_with_its_hook_and_its_grace,
];

/// Those that break something that others need: they run last, one by one.
pub(crate) const ALONE: &[Entry] = scenarios![
    outage::pods_outlive_the_apiserver_and_are_told_of_afterwards,
    outage::keda_comes_back_and_hears_the_next_push,
];
