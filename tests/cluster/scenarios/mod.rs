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
        &[$(ScenarioEntry {
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
    node::missing_image_is_pulled_with_backoff,
    node::exited_container_restarts_with_backoff,
    node::oom_killed_container_reports_its_reason,
    node::unschedulable_pod_waits_for_a_node,
    node::pod_ends_after_hook_and_grace_period,
    node_start::pull_and_start_are_timed_and_reported,
    node_start::cloud_node_joins_late_by_its_own_clock,
    node_start::logs_are_read_by_authorized_clients,
    definitions::printed_crd_is_stored_unchanged,
    definitions::invalid_routes_are_rejected_with_remedy,
    definitions::kubectl_shows_route_state,
    conflicts::older_route_wins_and_the_younger_follows,
    conflicts::file_takes_precedence_and_names_are_unique,
    conflicts::invalid_objects_are_skipped_with_reason,
    interceptor::first_request_starts_the_app_through_keda,
    interceptor::most_specific_rule_gets_the_request,
    interceptor::placeholder_is_served_while_app_is_down,
    add_on::rules_lead_to_their_apps_and_nowhere_else,
    add_on::routes_that_change_or_go_are_followed,
    add_on::load_scales_only_its_app_and_back_to_zero,
    add_on::another_target_value_reaches_the_hpa,
    add_on::scaled_object_before_its_route_starts_it,
    add_on::in_flight_requests_outlive_a_restart,
    paused::request_at_zero_gets_the_resume_command,
    paused::route_can_hold_until_pause_ends,
    paused::pause_ends_the_wait_only_at_zero,
    sessions::session_serves_and_ends_unattended,
    sessions::later_replica_ends_the_session,
    sessions::sessions_are_stopped_prolonged_and_refused,
    failing::held_requests_fail_early_with_the_reason,
    failing::failed_starts_report_the_reason,
    failing::held_requests_are_served_after_the_fix,
    failing::missing_scaled_object_is_reported,
    failing::scaled_object_of_another_scaler_is_recognised,
    direct::two_replicas_scale_to_one_and_back_once,
    direct::externally_scaled_workload_is_left_alone,
    direct::direct_scaling_requires_chart_switch,
    install::each_profile_installs_paused_and_uninstalls,
    install::every_chart_object_is_accepted,
    install::namespaced_release_serves_its_namespace,
    install::rights_are_sufficient_and_minimal,
    cold_start::request_starts_and_idleness_stops_a_model,
    cold_start::our_probe_is_far_ahead_of_kubelets,
    cold_start::load_outlasts_the_cooldown,
    cold_start::servers_that_speak_http_2_get_one_connection,
    cold_start::measurements_match_the_history,
    cold_start_record::every_phase_matches_the_history,
    cold_start_record::record_is_accurate_without_keda,
    cold_start_record::fast_clock_of_new_node_is_part_of_the_wait,
    cold_start_record::slow_clock_of_new_node_is_part_of_the_wait,
    cold_start_record::gateway_delay_is_a_phase,
    cold_start_record::failed_start_records_completed_phases,
    cold_start_record::record_of_two_pods_is_of_the_first_to_respond,
    cold_start_record::readable_logs_split_the_load_phase,
    scaling::replicas_grow_after_first_response,
    scaling::requests_held_by_the_ramp_add_no_replica,
    scaling::requests_between_polls_keep_the_model,
    scaling::no_push_while_replicas_exist,
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
    gateway::inference_pool_is_a_valid_target,
];

/// Scenarios that disrupt shared parts; they run last, one by one.
pub(crate) const SERIAL_SCENARIOS: &[ScenarioEntry] = scenarios![
    outage::pods_outlive_the_apiserver,
    outage::keda_receives_next_push_after_restart,
    failing::absent_keda_operator_is_an_obstacle,
    conflicts::object_of_newer_crd_blocks_no_other,
    install::cluster_release_serves_other_namespaces,
    control_plane::requests_survive_a_keda_restart,
    control_plane::apiserver_outage_does_not_affect_traffic,
];
