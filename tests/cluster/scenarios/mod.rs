//! Scenarios.

mod add_on;
mod cold_start;
mod cold_start_record;
mod conflicts;
mod control_plane;
mod definitions;
mod direct;
mod failing;
mod gateway;
mod harness;
mod install;
mod interceptor;
mod lost;
mod node;
mod node_start;
mod outage;
mod paused;
mod peers;
mod scaling;
mod sessions;

use crate::runner::ScenarioEntry;

/// Builds a list of scenarios; each is an `async fn(Scenario)` of a submodule.
macro_rules! scenarios {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$(Entry {
            name: concat!(stringify!($module), "::", stringify!($name)),
            run: |scenario| Box::pin($module::$name(scenario)),
        }),*]
    };
}

/// Scenarios that leave the cluster as it is; several run at the same time.
pub(crate) const PARALLEL_SCENARIOS: &[ScenarioEntry] = scenarios![
    harness::push_scales_from_zero_and_silence_to_zero,
    harness::replicas_run_with_chart_rights,
    harness::envoy_answers_503_at_zero_then_passes_on,
    node::a_missing_image_backs_off_until_it_is_there,
    node::exited_container_restarts_with_backoff,
    node::a_container_that_is_out_of_memory_says_so,
    node::a_pod_that_fits_nowhere_waits_for_a_node,
    node::a_pod_ends_with_its_hook_and_its_grace,
    node_start::a_pull_and_a_start_take_their_time_and_say_so,
    node_start::cloud_node_joins_late_by_its_own_clock,
    node_start::logs_are_read_by_authorized_clients,
    definitions::the_apiserver_keeps_what_anteroom_crds_prints,
    definitions::invalid_routes_are_rejected_with_remedy,
    definitions::users_see_how_routes_are,
    conflicts::older_route_wins_and_the_younger_follows,
    conflicts::file_takes_precedence_and_names_are_unique,
    conflicts::routes_that_are_none_are_skipped_and_say_why,
    interceptor::first_request_starts_the_app_through_keda,
    interceptor::the_most_specific_rule_has_the_request,
    interceptor::placeholder_is_served_while_app_is_down,
    add_on::rules_lead_to_their_apps_and_nowhere_else,
    add_on::routes_that_change_or_go_are_followed,
    add_on::load_scales_only_its_app_and_back_to_zero,
    add_on::another_target_value_reaches_the_hpa,
    add_on::scaled_object_before_its_route_starts_it,
    add_on::what_is_in_flight_outlives_a_restart,
    paused::request_at_zero_gets_the_resume_command,
    paused::a_route_may_wait_for_the_end_of_a_pause,
    paused::pause_ends_the_wait_only_at_zero,
    sessions::session_serves_and_ends_unattended,
    sessions::later_replica_ends_the_session,
    sessions::sessions_are_stopped_prolonged_and_refused,
    failing::held_requests_fail_early_with_the_reason,
    failing::failed_starts_report_the_reason,
    failing::held_requests_are_served_after_the_fix,
    failing::a_route_without_a_scaled_object_says_so,
    failing::scaled_object_of_another_scaler_is_recognised,
    direct::two_replicas_scale_to_one_and_back_once,
    direct::what_somebody_else_scales_is_left_to_them,
    direct::without_the_charts_switch_it_may_not,
    install::each_profile_installs_paused_and_uninstalls,
    install::all_that_the_chart_can_say_is_taken,
    install::a_release_for_one_namespace_serves_it,
    install::rights_are_what_is_needed_and_nothing_else,
    cold_start::request_starts_and_idleness_stops_a_model,
    cold_start::our_probe_is_far_ahead_of_kubelets,
    cold_start::load_outlasts_the_cooldown,
    cold_start::servers_that_speak_http_2_get_one_connection,
    cold_start::what_is_measured_is_what_happens,
    cold_start_record::each_phase_is_there_and_as_it_was,
    cold_start_record::it_is_true_without_keda,
    cold_start_record::fast_clock_of_new_node_is_part_of_the_wait,
    cold_start_record::slow_clock_of_new_node_is_part_of_the_wait,
    cold_start_record::a_gateway_that_is_not_open_yet_is_a_phase,
    cold_start_record::a_failure_is_a_record_of_how_far_it_came,
    cold_start_record::record_of_two_pods_is_of_the_first_to_respond,
    cold_start_record::where_logs_may_be_read_a_load_has_parts,
    scaling::it_grows_with_the_queue_once_a_pod_answers,
    scaling::requests_held_by_the_ramp_add_no_replica,
    scaling::requests_between_polls_keep_the_model,
    scaling::keda_is_left_alone_once_there_are_replicas,
    scaling::lost_metric_is_listed_again_and_wakes,
    scaling::terminating_pod_finishes_its_requests,
    peers::two_replicas_with_demand_on_one,
    peers::three_replicas_with_demand_on_one,
    peers::killed_replica_takes_its_requests_with_it,
    peers::replicas_are_replaced_one_after_the_other,
    lost::node_that_loses_power_gives_back_its_requests,
    lost::half_open_watches_are_replaced,
    lost::silent_apiserver_is_an_obstacle,
    gateway::held_requests_wait_for_an_unaware_envoy,
    gateway::the_pods_of_an_inference_pool_are_a_target,
];

/// Scenarios that disrupt shared parts; they run last, one by one.
pub(crate) const SERIAL_SCENARIOS: &[ScenarioEntry] = scenarios![
    outage::pods_outlive_the_apiserver,
    outage::keda_receives_next_push_after_restart,
    failing::absent_keda_operator_is_an_obstacle,
    conflicts::an_object_of_a_newer_definition_stops_nothing,
    install::cluster_release_serves_other_namespaces,
    control_plane::keda_is_restarted_while_models_are_asked_for,
    control_plane::apiserver_outage_does_not_affect_traffic,
];
