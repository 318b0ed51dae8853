//! What `anteroom bench advise` and `bench trace` can be told.

use std::path::PathBuf;

use crate::{bench::http::Base, domain::Period};

/// What an idle time, a floor and bounds of holding would have cost, and how long requests would have waited: replays a
/// log of requests.
///
/// Exits 0 with an advice, 1 if no setting reaches the goal, and 2 if there is nothing to replay.
#[derive(Clone, Debug, clap::Args)]
pub struct AdviseArgs {
    /// Logs of requests: CSV or JSON lines with a time and perhaps a duration, or access logs of nginx or Envoy; `-` is
    /// standard input.
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "synthetic", conflicts_with = "synthetic", help_heading = "Requests")]
    pub(super) arrivals: Vec<PathBuf>,
    /// A made-up log instead of a file; `anteroom bench trace` prints it.
    #[arg(long, value_name = "NAME", help_heading = "Requests")]
    pub(super) synthetic: Option<Synthetic>,
    /// Leave out what came before this, RFC 3339. Without it the log begins with its first request, and with that one's
    /// day (UTC) if it is longer than a day.
    #[arg(long, value_name = "TIME", help_heading = "Requests")]
    pub(super) from: Option<jiff::Timestamp>,
    /// Leave out what came from this time on.
    #[arg(long, value_name = "TIME", help_heading = "Requests")]
    pub(super) to: Option<jiff::Timestamp>,
    /// How long a request takes where the log does not say so. Without it, what the rest of the log says is drawn from.
    #[arg(long, value_name = "DURATION", help_heading = "Requests")]
    pub(super) service_time: Option<Period>,

    /// Records of cold starts: JSON of `bench cold-start`, a file of `report.dir`, or all *.jsonl of that folder.
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present_any = ["admin", "cold_start"], help_heading = "Starts")]
    pub(super) records: Vec<PathBuf>,
    /// The admin address of a running Anteroom, to ask for its records: http://host:port.
    #[arg(long, value_name = "URL", help_heading = "Starts")]
    pub(super) admin: Option<Base>,
    /// Take the records of this route.
    #[arg(long, value_name = "NAME", help_heading = "Starts")]
    pub(super) route: Option<String>,
    /// How long a start takes, instead of records; of several, each is as likely.
    #[arg(long, value_name = "DURATION", value_delimiter = ',', conflicts_with_all = ["records", "admin"], help_heading = "Starts")]
    pub(super) cold_start: Vec<Period>,

    /// Who scales, which decides what can be set.
    #[arg(long, value_enum, default_value_t = ScaledBy::Keda, help_heading = "Settings to try")]
    pub(super) scale_by: ScaledBy,
    /// Times without a request, after which the last replica goes.
    #[arg(
        long,
        value_name = "DURATION",
        value_delimiter = ',',
        default_value = "1m,2m,5m,10m,15m,30m,1h,2h",
        help_heading = "Settings to try"
    )]
    pub(super) idle: Vec<Period>,
    /// Replicas that stay whether they are wanted or not (KEDA's minReplicaCount). Default: 0,1,2 with KEDA, else 0.
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "Settings to try")]
    pub(super) floor: Vec<u32>,
    /// How many replicas KEDA may ask for. Without KEDA there is one.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) max_replicas: u32,
    /// concurrency.max of the route: requests in flight on one replica. Several are all tried, as with the next two.
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
    /// scaling.target of the route: how many waiting requests ask for another replica.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Settings to try")]
    pub(super) target: u32,
    /// scaling.linger of the route: with KEDA, the idle time is this and cooldownPeriod.
    #[arg(long, value_name = "DURATION", default_value = "60s", help_heading = "Settings to try")]
    pub(super) linger: Period,
    /// pollingInterval of the ScaledObject: KEDA goes to zero when it polls.
    #[arg(long, value_name = "DURATION", default_value = "15s", help_heading = "Settings to try")]
    pub(super) polling_interval: Period,

    /// GPUs of one replica.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cost and goal")]
    pub(super) gpus: u32,
    /// What one GPU costs an hour, in whatever currency.
    #[arg(long, value_name = "AMOUNT", value_parser = amount, help_heading = "Cost and goal")]
    pub(super) gpu_hour_price: Option<f64>,
    /// Recommend the cheapest that keeps this: p99=30s, p90=5s or median=1s of the added wait.
    #[arg(long, value_name = "GOAL", conflicts_with = "budget", help_heading = "Cost and goal")]
    pub(super) goal: Option<WaitGoal>,
    /// Recommend the shortest wait for no more than this: 200/month in the currency of --gpu-hour-price, or 300h/month of
    /// GPU time; also /day, /week, /year.
    #[arg(long, value_name = "BUDGET", help_heading = "Cost and goal")]
    pub(super) budget: Option<Budget>,
    /// The share of the requests that a recommendation may lose: held in vain, or refused.
    #[arg(long, value_name = "SHARE", default_value = "0.1%", value_parser = share, help_heading = "Cost and goal")]
    pub(super) max_lost: f64,

    /// How many times each setting is replayed, with other start-ups drawn each time.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) seeds: u32,
    /// The first seed. The same seeds give the same answer.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
    /// Write all of it as JSON, too; `-`: to standard output, instead of the text.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// Prints a made-up log of requests as CSV, to try `advise` with.
#[derive(Clone, Debug, clap::Args)]
pub struct TraceArgs {
    /// Which one.
    #[arg(value_enum, default_value_t = Synthetic::OfficeWeek)]
    pub(super) name: Synthetic,
    /// Another seed gives another week.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
}

/// A made-up log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Synthetic {
    /// The chat of twelve people: day and night, bursts, a nightly job, a quiet weekend.
    OfficeWeek,
}

/// Who changes the number of replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ScaledBy {
    /// KEDA, with a ScaledObject.
    Keda,
    /// Anteroom itself, in a cluster (`scaleBy: kubernetes`).
    Kubernetes,
    /// Anteroom itself, as a process of this machine.
    Process,
}

/// A wait that may not be exceeded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WaitGoal(pub(super) super::choice::Quantile, pub(super) Period);

/// What may be spent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Budget {
    /// For a month.
    pub(super) amount: f64,
    /// Whether it is GPU hours, not money.
    pub(super) is_hours: bool,
}

// === impl WaitGoal ===

impl std::str::FromStr for WaitGoal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use super::choice::Quantile;
        let told = || format!("`{text}` is no goal; write p99=30s, p90=5s or median=1s");
        let (name, within) = text.split_once('=').ok_or_else(told)?;
        let quantile = match name.trim() {
            "median" | "p50" => Quantile::Median,
            "p90" => Quantile::P90,
            "p99" => Quantile::P99,
            _ => return Err(told()),
        };
        Ok(Self(quantile, within.trim().parse()?))
    }
}

// === impl Budget ===

impl std::str::FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let told = || format!("`{text}` is no budget; write 200/month, or 300h/month for GPU hours");
        let (number, per) = text.split_once('/').ok_or_else(told)?;
        let in_a_month = match per.trim() {
            "day" => super::choice::MONTH / 24.0,
            "week" => super::choice::MONTH / (24.0 * 7.0),
            "month" => 1.0,
            "year" => 1.0 / 12.0,
            _ => return Err(told()),
        };
        let number = number.trim();
        let (number, is_hours) = number.strip_suffix('h').map_or((number, false), |number| (number, true));
        Ok(Self { amount: amount(number).map_err(|_| told())? * in_a_month, is_hours })
    }
}

fn amount(text: &str) -> Result<f64, String> {
    let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| format!("`{text}` is no amount"))
}

fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 0.01));
    let share = amount(number)? * unit;
    if share > 1.0 { Err(format!("`{text}` is more than all")) } else { Ok(share) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::advise::choice::Quantile;

    #[test]
    fn goals_and_budgets_are_read_as_people_write_them() {
        let goal = "p99=30s".parse::<WaitGoal>().unwrap();
        assert_eq!(goal, WaitGoal(Quantile::P99, Period::from_secs(30)));
        assert_eq!(
            "p50 = 1m".parse::<WaitGoal>().unwrap(),
            WaitGoal(Quantile::Median, Period::from_secs(60))
        );
        for (text, amount, is_hours) in
            [("200/month", 200.0, false), ("24h/day", 730.5, true), ("1200/year", 100.0, false)]
        {
            let budget = text.parse::<Budget>().unwrap();
            assert!(
                (budget.amount - amount).abs() < 1e-9 && budget.is_hours == is_hours,
                "{text}: {budget:?}"
            );
        }
        for wrong in ["p99", "p98=1s", "p99=1", "=1s"] {
            assert!(wrong.parse::<WaitGoal>().is_err(), "{wrong}");
        }
        for wrong in ["200", "-1/month", "x/month", "1/decade", "NaN/month"] {
            assert!(wrong.parse::<Budget>().unwrap_err().contains("200/month"), "{wrong}");
        }
        assert_eq!((share("0.1%"), share("0.5")), (Ok(0.001), Ok(0.5)));
        assert!(share("101%").is_err() && share("x").is_err());
    }
}
