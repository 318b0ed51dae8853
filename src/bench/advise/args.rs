//! Arguments of `anteroom bench advise` and `bench trace`.

use std::path::PathBuf;

use crate::{bench::http::BaseUrl, domain::Period};

/// Estimates cost and waiting times of idle timeouts, replica floors and hold limits by replaying a log of requests.
///
/// Exits 0 on success, 1 if no setting reaches the goal, and 2 if there is nothing to replay.
#[derive(Clone, Debug, clap::Args)]
pub struct AdviseArgs {
    /// Request logs: CSV or JSON lines with a time and optionally a duration, or access logs of nginx or Envoy; `-` reads
    /// standard input.
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "synthetic", conflicts_with = "synthetic", help_heading = "Requests")]
    pub(super) arrivals: Vec<PathBuf>,
    /// Synthetic log instead of a file; `anteroom bench trace` prints it.
    #[arg(long, value_name = "NAME", help_heading = "Requests")]
    pub(super) synthetic: Option<SyntheticLog>,
    /// Ignore requests before this time, RFC 3339. By default the window starts at the first request, or at the start of
    /// its day (UTC) if the log is longer than a day.
    #[arg(long, value_name = "TIME", help_heading = "Requests")]
    pub(super) from: Option<jiff::Timestamp>,
    /// Ignore requests from this time on.
    #[arg(long, value_name = "TIME", help_heading = "Requests")]
    pub(super) to: Option<jiff::Timestamp>,
    /// Duration of requests without one in the log. By default it is drawn from the other requests.
    #[arg(long, value_name = "DURATION", help_heading = "Requests")]
    pub(super) service_time: Option<Period>,

    /// Cold-start records: JSON of `bench cold-start`, a file of `report.dir`, or all *.jsonl files of that directory.
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present_any = ["admin", "cold_start"], help_heading = "Starts")]
    pub(super) records: Vec<PathBuf>,
    /// Admin URL of a running Anteroom to read cold-start records from: http://host:port.
    #[arg(long, value_name = "URL", help_heading = "Starts")]
    pub(super) admin: Option<BaseUrl>,
    /// Use the records of this route.
    #[arg(long, value_name = "NAME", help_heading = "Starts")]
    pub(super) route: Option<String>,
    /// Start-up time instead of records; several are equally likely.
    #[arg(long, value_name = "DURATION", value_delimiter = ',', conflicts_with_all = ["records", "admin"], help_heading = "Starts")]
    pub(super) cold_start: Vec<Period>,

    /// Component that scales the target; determines the available settings.
    #[arg(long, value_enum, default_value_t = ScaledBy::Keda, help_heading = "Settings to try")]
    pub(super) scale_by: ScaledBy,
    /// Idle times after which the last replica stops.
    #[arg(
        long,
        value_name = "DURATION",
        value_delimiter = ',',
        default_value = "1m,2m,5m,10m,15m,30m,1h,2h",
        help_heading = "Settings to try"
    )]
    pub(super) idle: Vec<Period>,
    /// Minimum number of replicas (KEDA's minReplicaCount). Default: 0,1,2 with KEDA, else 0.
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "Settings to try")]
    pub(super) floor: Vec<u32>,
    /// Maximum number of replicas with KEDA (maxReplicaCount). Without KEDA it is 1.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) max_replicas: u32,
    /// concurrency.max of the route: requests in flight per replica. Like the next two, accepts several values.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) concurrency: Vec<u32>,
    /// hold.timeout of the route.
    #[arg(
        long,
        value_name = "DURATION",
        value_delimiter = ',',
        default_value = "15m",
        help_heading = "Settings to try"
    )]
    pub(super) hold_timeout: Vec<Period>,
    /// hold.maxRequests of the route.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "256", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) hold_max_requests: Vec<u32>,
    /// scaling.target of the route: waiting requests per replica.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) target: u32,
    /// scaling.linger of the route; with KEDA, the idle time is linger plus cooldownPeriod.
    #[arg(long, value_name = "DURATION", default_value = "60s", help_heading = "Settings to try")]
    pub(super) linger: Period,
    /// pollingInterval of the ScaledObject; KEDA scales to zero only when it polls.
    #[arg(long, value_name = "DURATION", default_value = "15s", help_heading = "Settings to try")]
    pub(super) polling_interval: Period,

    /// GPUs per replica.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cost and goal")]
    pub(super) gpus: u32,
    /// Price of a GPU hour, in any currency.
    #[arg(long, value_name = "AMOUNT", value_parser = amount, help_heading = "Cost and goal")]
    pub(super) gpu_hour_price: Option<f64>,
    /// Recommend the cheapest setting whose added wait meets this goal: p99=30s, p90=5s or median=1s.
    #[arg(long, value_name = "GOAL", conflicts_with = "budget", help_heading = "Cost and goal")]
    pub(super) goal: Option<WaitGoal>,
    /// Recommend the setting with the shortest wait within this budget: 200/month in the currency of --gpu-hour-price, or
    /// 300h/month of GPU time; also /day, /week, /year.
    #[arg(long, value_name = "BUDGET", help_heading = "Cost and goal")]
    pub(super) budget: Option<CostBudget>,
    /// Largest share of requests that a recommended setting may lose to hold timeouts and rejections.
    #[arg(long, value_name = "SHARE", default_value = "0.1%", value_parser = share, help_heading = "Cost and goal")]
    pub(super) max_lost: f64,

    /// Number of replays per setting, each with different random start-up times.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) seeds: u32,
    /// First seed. Equal seeds give equal results.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
    /// Also write the results to this file as JSON; `-` writes JSON to standard output instead of text.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// Prints a synthetic request log as CSV, to try `advise` with.
#[derive(Clone, Debug, clap::Args)]
pub struct TraceArgs {
    /// Log to print.
    #[arg(value_enum, default_value_t = SyntheticLog::OfficeWeek)]
    pub(super) name: SyntheticLog,
    /// Seed of the random numbers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
}

/// A synthetic request log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum SyntheticLog {
    /// Chat of a team of twelve: working hours, bursts, a nightly job, a quiet weekend.
    OfficeWeek,
}

/// Component that sets the number of replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ScaledBy {
    /// KEDA, with a ScaledObject.
    Keda,
    /// Anteroom, in a cluster (`scaleBy: kubernetes`).
    Kubernetes,
    /// Anteroom, as a local process.
    Process,
}

/// Upper bound of a quantile of the wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WaitGoal(pub(super) super::choice::Quantile, pub(super) Period);

/// Upper bound of the cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CostBudget {
    /// Amount per month.
    pub(super) amount: f64,
    /// Unit of `amount`: GPU hours if set, otherwise money.
    pub(super) is_hours: bool,
}

// === impl WaitGoal ===

impl std::str::FromStr for WaitGoal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use super::choice::Quantile;
        let invalid = || format!("`{text}` is not a goal; write p99=30s, p90=5s or median=1s");
        let (name, within) = text.split_once('=').ok_or_else(invalid)?;
        let quantile = match name.trim() {
            "median" | "p50" => Quantile::Median,
            "p90" => Quantile::P90,
            "p99" => Quantile::P99,
            _ => return Err(invalid()),
        };
        Ok(Self(quantile, within.trim().parse()?))
    }
}

// === impl CostBudget ===

impl std::str::FromStr for CostBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("`{text}` is not a budget; write 200/month, or 300h/month for GPU hours");
        let (number, per) = text.split_once('/').ok_or_else(invalid)?;
        let in_a_month = match per.trim() {
            "day" => super::choice::HOURS_PER_MONTH / 24.0,
            "week" => super::choice::HOURS_PER_MONTH / (24.0 * 7.0),
            "month" => 1.0,
            "year" => 1.0 / 12.0,
            _ => return Err(invalid()),
        };
        let number = number.trim();
        let (number, is_hours) = number.strip_suffix('h').map_or((number, false), |number| (number, true));
        Ok(Self { amount: amount(number).map_err(|_| invalid())? * in_a_month, is_hours })
    }
}

fn amount(text: &str) -> Result<f64, String> {
    let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| format!("`{text}` is not an amount"))
}

fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 0.01));
    let share = amount(number)? * unit;
    if share > 1.0 { Err(format!("`{text}` is more than 100 %")) } else { Ok(share) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::advise::choice::Quantile;

    #[test]
    fn goals_and_budgets_are_parsed() {
        let goal = "p99=30s".parse::<WaitGoal>().unwrap();
        assert_eq!(goal, WaitGoal(Quantile::P99, Period::from_secs(30)));
        assert_eq!(
            "p50 = 1m".parse::<WaitGoal>().unwrap(),
            WaitGoal(Quantile::Median, Period::from_secs(60))
        );
        for (text, amount, is_hours) in
            [("200/month", 200.0, false), ("24h/day", 730.5, true), ("1200/year", 100.0, false)]
        {
            let budget = text.parse::<CostBudget>().unwrap();
            assert!(
                (budget.amount - amount).abs() < 1e-9 && budget.is_hours == is_hours,
                "{text}: {budget:?}"
            );
        }
        for wrong in ["p99", "p98=1s", "p99=1", "=1s"] {
            assert!(wrong.parse::<WaitGoal>().is_err(), "{wrong}");
        }
        for wrong in ["200", "-1/month", "x/month", "1/decade", "NaN/month"] {
            assert!(wrong.parse::<CostBudget>().unwrap_err().contains("200/month"), "{wrong}");
        }
        assert_eq!((share("0.1%"), share("0.5")), (Ok(0.001), Ok(0.5)));
        assert!(share("101%").is_err() && share("x").is_err());
    }
}
