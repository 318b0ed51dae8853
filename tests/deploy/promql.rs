//! Metrics that a PromQL query reads, and the labels of its result.

use std::collections::BTreeSet;

use promql_parser::{
    label::{MatchOp, Matcher},
    parser::{Expr, LabelModifier, VectorSelector, parse},
};

use super::exported::Exported;

/// Labels added by the scrape configuration.
const SCRAPE_LABELS: [&str; 4] = ["instance", "job", "namespace", "pod"];

/// Errors in a query, and the metrics it reads.
pub struct CheckedQuery {
    /// Labels of the result.
    pub labels: BTreeSet<String>,
    /// Names of the metrics.
    pub names: BTreeSet<String>,
    /// Errors, one sentence each.
    pub wrong: Vec<String>,
}

struct PromqlChecker<'a> {
    exported: &'a Exported,
    /// Allowed values of a metric's label, if they are a closed set.
    values: &'a dyn Fn(&str, &str) -> Option<BTreeSet<String>>,
    names: BTreeSet<String>,
    wrong: Vec<String>,
}

/// Checks a query after replacing the variables of the dashboard.
pub fn check(
    query: &str,
    exported: &Exported,
    values: &dyn Fn(&str, &str) -> Option<BTreeSet<String>>,
) -> CheckedQuery {
    let filled = [
        ("$__rate_interval", "5m"),
        ("$__interval", "1m"),
        ("$__range", "6h"),
        ("$namespace", ".*"),
        ("$route", ".*"),
    ]
    .iter()
    .fold(query.to_owned(), |query, (variable, value)| query.replace(variable, value));
    let mut checker = PromqlChecker { exported, values, names: BTreeSet::new(), wrong: Vec::new() };
    let labels = match parse(&filled) {
        _ if filled.contains('$') => {
            checker.wrong.push("a variable that there is not".into());
            BTreeSet::new()
        }
        Ok(expr) => checker.labels(&expr),
        Err(error) => {
            checker.wrong.push(error.to_string());
            BTreeSet::new()
        }
    };
    let wrong = checker.wrong.into_iter().map(|wrong| format!("{query}: {wrong}")).collect();
    CheckedQuery { labels, names: checker.names, wrong }
}

impl PromqlChecker<'_> {
    /// Returns the labels of the result.
    fn labels(&mut self, expr: &Expr) -> BTreeSet<String> {
        match expr {
            Expr::VectorSelector(selector) => self.selector(selector),
            Expr::MatrixSelector(matrix) => self.selector(&matrix.vs),
            Expr::Aggregate(aggregate) => {
                let inner = self.labels(&aggregate.expr);
                match &aggregate.modifier {
                    None => BTreeSet::new(),
                    Some(LabelModifier::Include(kept)) => {
                        self.known(&kept.labels, &inner);
                        kept.labels.iter().cloned().collect()
                    }
                    Some(LabelModifier::Exclude(gone)) => {
                        self.known(&gone.labels, &inner);
                        inner.into_iter().filter(|label| !gone.labels.contains(label)).collect()
                    }
                }
            }
            Expr::Binary(binary) => {
                let (left, right) = (self.labels(&binary.lhs), self.labels(&binary.rhs));
                if let Some(modifier) = &binary.modifier {
                    for labels in
                        modifier.matching.iter().map(LabelModifier::labels).chain(modifier.card.labels())
                    {
                        self.known(&labels.labels, &left);
                        self.known(&labels.labels, &right);
                    }
                }
                let are_vectors = ![&binary.lhs, &binary.rhs].iter().any(|side| is_number(side));
                let is_plain = binary.modifier.as_ref().is_none_or(|modifier| modifier.matching.is_none());
                if are_vectors && is_plain && left != right {
                    self.wrong.push(format!("nothing of {left:?} matches anything of {right:?}"));
                }
                &left | &right
            }
            Expr::Call(call) => {
                let mut labels = BTreeSet::new();
                for argument in &call.args.args {
                    labels.extend(self.labels(argument));
                }
                match call.func.name {
                    "histogram_quantile" if !labels.remove("le") => {
                        self.wrong.push("a quantile of what has no buckets".into());
                    }
                    "label_replace" | "label_join" => {
                        self.wrong.push("labels made up are not followed".into())
                    }
                    _ => {}
                }
                labels
            }
            Expr::Paren(paren) => self.labels(&paren.expr),
            Expr::Unary(unary) => self.labels(&unary.expr),
            Expr::Subquery(subquery) => self.labels(&subquery.expr),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) => BTreeSet::new(),
            Expr::Extension(_) => {
                self.wrong.push("an extension".into());
                BTreeSet::new()
            }
        }
    }

    fn selector(&mut self, selector: &VectorSelector) -> BTreeSet<String> {
        let Some(name) = &selector.name else {
            self.wrong.push("a selector without the name of a metric".into());
            return BTreeSet::new();
        };
        self.names.insert(name.clone());
        let Some(labels) = self.exported.get(name) else {
            self.wrong.push(format!("`{name}` is not exported"));
            return BTreeSet::new();
        };
        let labels: BTreeSet<_> = labels.iter().cloned().chain(SCRAPE_LABELS.map(String::from)).collect();
        let matchers =
            selector.matchers.matchers.iter().chain(selector.matchers.or_matchers.iter().flatten());
        for matcher in matchers {
            self.known(std::slice::from_ref(&matcher.name), &labels);
            self.matched(name, matcher);
        }
        labels
    }

    /// Checks that each value named by a matcher exists.
    fn matched(&mut self, metric: &str, matcher: &Matcher) {
        let Some(values) = (self.values)(metric, &matcher.name) else { return };
        let named: Vec<&str> = match matcher.op {
            MatchOp::Equal | MatchOp::NotEqual => vec![&matcher.value],
            MatchOp::Re(_) | MatchOp::NotRe(_) => matcher.value.split('|').collect(),
        };
        for value in named.into_iter().filter(|value| *value != ".*" && !values.contains(*value)) {
            self.wrong.push(format!("`{}` of `{metric}` is never `{value}`", matcher.name));
        }
    }

    fn known(&mut self, wanted: &[String], there: &BTreeSet<String>) {
        for label in wanted.iter().filter(|label| !there.contains(*label)) {
            self.wrong.push(format!("there is no label `{label}` here, but {there:?}"));
        }
    }
}

fn is_number(expr: &Expr) -> bool {
    match expr {
        Expr::NumberLiteral(_) => true,
        Expr::Paren(paren) => is_number(&paren.expr),
        Expr::Unary(unary) => is_number(&unary.expr),
        _ => false,
    }
}

#[test]
fn faulty_queries_are_detected() {
    let labels = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let exported: Exported = [
        ("a_total".to_owned(), labels(&["route", "outcome"])),
        ("b_bucket".to_owned(), labels(&["route", "le"])),
    ]
    .into();
    let values = |metric: &str, label: &str| {
        ((metric, label) == ("a_total", "outcome")).then(|| labels(&["good", "bad"]))
    };
    let check = |query: &str| check(query, &exported, &values);
    for (query, expected) in [
        (
            "sum by (outcome) (rate(a_total{route=~\"$route\", outcome=~\"good|bad\"}[$__rate_interval]))",
            "outcome",
        ),
        ("histogram_quantile(0.9, sum by (le, route) (increase(b_bucket[1h])))", "route"),
        (
            "max by (namespace) (a_total) > 0 or (max by (namespace) (a_total offset 10m) unless max by (namespace) (b_bucket))",
            "namespace",
        ),
        ("sum without (outcome, instance, job, pod, namespace) (a_total)", "route"),
    ] {
        let checked = check(query);
        assert_eq!((checked.labels, checked.wrong), (labels(&[expected]), Vec::<String>::new()), "{query}");
    }
    assert_eq!(check("a_total / on (route) group_left b_bucket").names, labels(&["a_total", "b_bucket"]));
    for (query, told) in [
        ("sum(a_totals)", "`a_totals` is not exported"),
        ("a_total{phase=\"load\"}", "no label `phase`"),
        ("a_total{outcome=\"ugly\"}", "never `ugly`"),
        ("a_total{outcome!~\"good|ugly\"}", "never `ugly`"),
        ("sum by (phase) (a_total)", "no label `phase`"),
        ("sum by (route) (sum by (outcome) (a_total))", "no label `route`"),
        ("histogram_quantile(0.5, sum by (route) (b_bucket))", "no buckets"),
        ("sum by (route) (a_total) / sum by (outcome) (a_total)", "matches anything"),
        ("a_total * on (phase) b_bucket", "no label `phase`"),
        ("rate(a_total[$interval])", "a variable"),
        ("{route=\"x\"}", "without the name"),
        ("sum(a_total", ""),
        ("rate(a_total)", ""),
    ] {
        let wrong = check(query).wrong;
        assert!(wrong.first().is_some_and(|wrong| wrong.contains(told)), "{query}: {wrong:?}");
    }
}
