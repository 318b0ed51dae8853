//! Configuration lines for a setting.

use std::fmt::Write as _;

use super::{
    super::{advice::Advice, args::ScaledBy, replay::ReplaySettings},
    period,
};

/// Renders the configuration, per file or object.
pub(super) fn lines(advice: &Advice<'_>, settings: &ReplaySettings) -> String {
    let args = advice.args;
    let name = args.route.as_deref().unwrap_or("NAME");
    let hold =
        format!("hold: {{timeout: {}, maxRequests: {}}}", period(settings.hold), settings.hold_requests);
    let concurrency = format!("concurrency: {{max: {}}}", settings.concurrency);
    let mut text = String::new();
    let mut line = |words: &str| {
        let _ = writeln!(text, "{words}");
    };
    match args.scale_by {
        ScaledBy::Process => {
            line("# the configuration file");
            line("routes:");
            line(&format!("  - name: {name}"));
            line("    target:");
            line("      process:");
            line(&format!("        idleTimeout: {}", period(settings.idle)));
            line(&format!("    {hold}"));
            line(&format!("    {concurrency}"));
        }
        ScaledBy::Kubernetes => {
            line("# the ModelRoute");
            line("spec:");
            line("  scaleBy: kubernetes");
            line(&format!("  scaling: {{idleTimeout: {}}}", period(settings.idle)));
            line(&format!("  {hold}"));
            line(&format!("  {concurrency}"));
        }
        ScaledBy::Keda => {
            line("# the ScaledObject");
            line("spec:");
            line(&format!("  minReplicaCount: {}", settings.floor));
            line(&format!("  maxReplicaCount: {}", settings.max_replicas));
            if settings.floor == 0 {
                let linger = args.linger.get().as_secs();
                let idle = settings.idle / 1_000;
                let cooldown = idle.saturating_sub(linger);
                line(&format!(
                    "  cooldownPeriod: {cooldown}          # {} minus the linger",
                    period(settings.idle)
                ));
                line(&format!("  initialCooldownPeriod: {cooldown}"));
                line(&format!("  pollingInterval: {}", args.polling_interval.get().as_secs()));
            }
            line("# the ModelRoute");
            line("spec:");
            line(&format!("  {hold}"));
            line(&format!("  {concurrency}"));
            line(&format!("  scaling: {{target: {}, linger: {}}}", settings.target, args.linger));
        }
    }
    text
}
