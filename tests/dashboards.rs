//! The promises of the files under `dashboards/`, checked without Grafana and without Prometheus. The files name
//! exported metrics, select the chosen values, explain themselves, and are tested. Another test checks them with a real
//! Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{Expr, VectorSelector, parse, token};
use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Value};

/// Values in place of Grafana's intervals. These durations are unusual, so they differ from all that are written by
/// hand.
const RATE_INTERVAL: &str = "7919s";
const RANGE: &str = "7907s";

/// The functions that may take a counter.
const OF_COUNTERS: [&str; 5] = ["rate", "irate", "increase", "resets", "changes"];

// Reading the files.

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn dashboard() -> Value {
    serde_json::from_str(&read("dashboards/millpond.json")).expect("the dashboard is JSON")
}

/// A YAML file as the same kind of value as the dashboard. A key that stands twice is an error of the parser.
fn yaml(path: &str) -> Value {
    fn value(yaml: &Yaml<'_>) -> Value {
        match yaml {
            Yaml::Value(Scalar::String(text)) => text.as_ref().into(),
            Yaml::Value(Scalar::Integer(number)) => (*number).into(),
            Yaml::Value(Scalar::FloatingPoint(number)) => number.into_inner().into(),
            Yaml::Value(Scalar::Boolean(truth)) => (*truth).into(),
            Yaml::Value(Scalar::Null) => Value::Null,
            Yaml::Sequence(items) => items.iter().map(value).collect(),
            Yaml::Mapping(entries) => {
                let entries = entries
                    .iter()
                    .map(|(key, item)| (key.as_str().expect("a key is text").to_owned(), value(item)));
                entries.collect::<Map<_, _>>().into()
            }
            other => panic!("nothing these files need: {other:?}"),
        }
    }
    let documents = Yaml::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(documents.len(), 1, "{path} is one document");
    value(&documents[0])
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

fn list<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Every panel and row, those inside a collapsed row too.
fn everything(dashboard: &Value) -> Vec<&Value> {
    list(dashboard, "panels")
        .iter()
        .flat_map(|panel| std::iter::once(panel).chain(list(panel, "panels")))
        .collect()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    everything(dashboard).into_iter().filter(|panel| panel["type"] != "row").collect()
}

/// The rules of both files: recording rules have `record`, alerts have `alert`.
fn rules() -> Vec<Value> {
    let files = ["rules", "alerts"].map(|name| yaml(&format!("dashboards/prometheus/{name}.yml")));
    files
        .iter()
        .flat_map(|file| list(file, "groups"))
        .flat_map(|group| list(group, "rules"))
        .cloned()
        .collect()
}

fn alerts() -> Vec<Value> {
    rules().into_iter().filter(|rule| !rule["alert"].is_null()).collect()
}

// Reading the queries.

/// A query, and where it stands.
struct Query {
    place: String,
    expr: Expr,
}

impl Query {
    fn new(place: String, query: &str) -> Self {
        let query = query.replace("$__rate_interval", RATE_INTERVAL).replace("$__range", RANGE);
        let expr = parse(&query).unwrap_or_else(|error| panic!("{place}: {error}: {query}"));
        Query { place, expr }
    }

    /// Every expression in it, each with the function it is an argument of.
    fn parts(&self) -> Vec<(Option<&str>, &Expr)> {
        let mut found = Vec::new();
        let mut left = vec![(None, &self.expr)];
        while let Some((function, expr)) = left.pop() {
            found.push((function, expr));
            match expr {
                Expr::Aggregate(aggregate) => left.push((None, &aggregate.expr)),
                Expr::Unary(unary) => left.push((None, &unary.expr)),
                Expr::Binary(binary) => left.extend([(None, &*binary.lhs), (None, &*binary.rhs)]),
                Expr::Paren(paren) => left.push((function, &paren.expr)),
                Expr::Call(call) => {
                    left.extend(call.args.args.iter().map(|argument| (Some(call.func.name), &**argument)));
                }
                Expr::Subquery(subquery) => left.push((None, &subquery.expr)),
                _ => {}
            }
        }
        found
    }

    /// Every selector in it, each with the function it is an argument of.
    fn selectors(&self) -> Vec<(Option<&str>, &VectorSelector)> {
        let selectors = self.parts().into_iter().filter_map(|(function, part)| match part {
            Expr::VectorSelector(selector) => Some((function, selector)),
            Expr::MatrixSelector(matrix) => Some((function, &matrix.vs)),
            _ => None,
        });
        selectors.collect()
    }
}

fn name(selector: &VectorSelector) -> &str {
    selector.name.as_deref().expect("a selector begins with a metric's name")
}

/// The queries of every panel, and of the annotations.
fn panel_queries(dashboard: &Value) -> Vec<Query> {
    let mut queries = Vec::new();
    for panel in panels(dashboard) {
        let targets = list(panel, "targets");
        assert!(!targets.is_empty(), "{} asks nothing", panel["title"]);
        queries.extend(
            targets.iter().map(|target| Query::new(text(panel, "title").to_owned(), text(target, "expr"))),
        );
    }
    let annotations =
        list(&dashboard["annotations"], "list").iter().filter(|annotation| annotation["builtIn"] != 1);
    queries.extend(
        annotations.map(|one| Query::new(format!("annotation {}", text(one, "name")), text(one, "expr"))),
    );
    queries
}

fn rule_queries() -> Vec<Query> {
    let query = |rule: &Value| {
        Query::new(format!("{}{}", text(rule, "record"), text(rule, "alert")), text(rule, "expr"))
    };
    rules().iter().map(query).collect()
}

fn all_queries() -> Vec<Query> {
    let mut queries = panel_queries(&dashboard());
    queries.extend(rule_queries());
    queries
}

// The exported metrics.

/// Every family with its type, and every series as it is written.
struct Exported {
    types: BTreeMap<String, String>,
    series: Vec<String>,
}

impl Exported {
    fn read() -> Self {
        let golden = read("tests/golden/metrics.txt");
        let types = golden.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let series =
            golden.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        Exported {
            types: types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect(),
            series: series.map(|(series, _)| series.to_owned()).collect(),
        }
    }

    /// The family a series belongs to: that of `_bucket`, `_count` and `_sum` is the histogram.
    fn family<'n>(&self, name: &'n str) -> Option<&'n str> {
        let parts = ["_bucket", "_count", "_sum"].into_iter().filter_map(|end| name.strip_suffix(end));
        let histogram =
            parts.into_iter().find(|base| self.types.get(*base).is_some_and(|kind| kind == "histogram"));
        histogram.or_else(|| self.types.contains_key(name).then_some(name))
    }

    fn is_counter(&self, name: &str) -> bool {
        match self.family(name) {
            Some(family) => self.types[family] == "counter" || self.types[family] == "histogram",
            None => name.ends_with("_total"),
        }
    }

    /// Whether a series has this name and this label.
    fn has(&self, name: &str, label: &Matcher) -> bool {
        let (start, pair) = (format!("{name}{{"), format!("{}=\"{}\"", label.name, label.value));
        self.series.iter().any(|series| series.starts_with(&start) && series.contains(&pair))
    }
}

// The promises.

#[test]
fn data_source_job_instance_and_pool_are_chosen_at_the_top() {
    let dashboard = dashboard();
    let variables = list(&dashboard["templating"], "list");
    let names: Vec<&str> = variables.iter().map(|variable| text(variable, "name")).collect();
    assert_eq!(names, ["datasource", "job", "instance", "pool"]);
    assert_eq!(variables[0]["type"], "datasource");
    assert_eq!(variables[0]["query"], "prometheus");
    let exported = Exported::read();
    for variable in &variables[1..] {
        let name = text(variable, "name");
        assert_eq!(variable["type"], "query", "{name}");
        let query = text(&variable["query"], "query");
        let asked =
            query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(&format!(", {name})")));
        let selector = asked.unwrap_or_else(|| panic!("{name} is not the label's values: {query}"));
        let metric = selector.split('{').next().expect("a metric");
        assert!(exported.types.contains_key(metric), "{name}: {metric} is not exported");
        assert_eq!(variable["multi"], true, "{name}: several can be chosen");
        assert_eq!(variable["includeAll"], true, "{name}: all can be chosen");
        assert_eq!(variable["refresh"], 2, "{name}: asked again when the time range changes");
    }
    for part in panels(&dashboard).into_iter().chain(&variables[1..]) {
        assert_eq!(part["datasource"]["uid"], "${datasource}", "{}{}", part["title"], part["name"]);
        for target in list(part, "targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{}", part["title"]);
        }
    }
}

#[test]
fn every_panel_says_what_it_shows_and_what_to_do() {
    let dashboard = dashboard();
    for panel in panels(&dashboard) {
        let title = text(panel, "title");
        assert!(title.len() > 2, "panel {} has no title", panel["id"]);
        assert!(text(panel, "description").len() > 80, "{title}: no description that helps");
        let field = &panel["fieldConfig"]["defaults"];
        assert!(!text(field, "unit").is_empty(), "{title}: no unit");
        assert!(
            !list(&field["thresholds"], "steps").is_empty(),
            "{title}: no thresholds, not even one colour"
        );
    }
    let titles: BTreeSet<&str> = everything(&dashboard).iter().map(|panel| text(panel, "title")).collect();
    assert_eq!(titles.len(), everything(&dashboard).len(), "a title stands twice");
}

#[test]
fn every_query_asks_only_for_what_was_chosen() {
    for query in panel_queries(&dashboard()) {
        assert!(!query.selectors().is_empty(), "{}: selects nothing", query.place);
        for (_, selector) in query.selectors() {
            let limited = |label: &str| {
                let value = format!("${label}");
                let is = |matcher: &Matcher| matches!(matcher.op, MatchOp::Re(_)) && matcher.value == value;
                selector.matchers.matchers.iter().any(|matcher| matcher.name == label && is(matcher))
            };
            let name = name(selector);
            let needed: &[&str] = if name.starts_with("millpond_pool_") {
                &["job", "instance", "pool"]
            } else {
                &["job", "instance"]
            };
            for label in needed {
                assert!(limited(label), "{}: {name} lacks {label}=~\"${label}\"", query.place);
            }
        }
    }
}

#[test]
fn rates_are_taken_over_grafanas_intervals() {
    for query in panel_queries(&dashboard()) {
        for (function, part) in query.parts() {
            if let Expr::MatrixSelector(matrix) = part {
                let seconds = format!("{}s", matrix.range.as_secs());
                let function = function.unwrap_or("nothing");
                let whole_range_is_meant =
                    ["increase", "changes", "resets", "max_over_time", "last_over_time"].contains(&function);
                assert!(
                    seconds == RATE_INTERVAL || (seconds == RANGE && whole_range_is_meant),
                    "{}: {function} over {seconds} of {}",
                    query.place,
                    name(&matrix.vs)
                );
            }
            assert!(!matches!(part, Expr::Subquery(_)), "{}: a subquery has a step of its own", query.place);
        }
    }
}

#[test]
fn counters_are_read_only_by_how_they_rise() {
    let exported = Exported::read();
    for query in all_queries() {
        for (function, selector) in query.selectors() {
            let name = name(selector);
            let rises = function.is_some_and(|function| OF_COUNTERS.contains(&function));
            assert!(rises || !exported.is_counter(name), "{}: the counter {name} as it stands", query.place);
            let takes_a_counter =
                function.is_some_and(|function| ["rate", "irate", "increase"].contains(&function));
            assert!(
                !takes_a_counter || exported.is_counter(name),
                "{}: the rise of {name}, no counter",
                query.place
            );
        }
    }
}

/// 0 / 0 is NaN, which no panel draws and no threshold meets.
#[test]
fn what_divides_has_a_floor() {
    for query in all_queries() {
        for (_, part) in query.parts() {
            let Expr::Binary(binary) = part else { continue };
            if binary.op.id() == token::T_DIV {
                let floored = match &*binary.rhs {
                    Expr::Call(call) => call.func.name == "clamp_min",
                    other => matches!(other, Expr::NumberLiteral(number) if number.val != 0.0),
                };
                assert!(floored, "{}: {} may be 0", query.place, binary.rhs);
            }
        }
    }
}

#[test]
fn ids_are_unique() {
    let dashboard = dashboard();
    let ids: Vec<u64> =
        everything(&dashboard).iter().map(|panel| panel["id"].as_u64().expect("an id")).collect();
    let unique: BTreeSet<u64> = ids.iter().copied().collect();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    for panel in panels(&dashboard) {
        let references: BTreeSet<&str> =
            list(panel, "targets").iter().map(|target| text(target, "refId")).collect();
        assert_eq!(
            references.len(),
            list(panel, "targets").len(),
            "{}: a refId stands twice",
            panel["title"]
        );
    }
}

#[test]
fn panels_stand_on_the_grid_and_not_on_each_other() {
    let dashboard = dashboard();
    let mut taken: BTreeMap<(u64, u64), &str> = BTreeMap::new();
    for panel in everything(&dashboard) {
        let title = text(panel, "title");
        let [x, y, w, h] =
            ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().expect("a place on the grid"));
        assert!(w > 0 && h > 0 && x + w <= 24, "{title} is wider than the 24 columns");
        for cell in (x..x + w).flat_map(|column| (y..y + h).map(move |line| (column, line))) {
            if let Some(other) = taken.insert(cell, title) {
                panic!("{title} stands on {other} at {cell:?}");
            }
        }
    }
}

#[test]
fn the_file_is_the_source_of_the_dashboard() {
    let dashboard = dashboard();
    assert_eq!(dashboard["editable"], false);
    assert_eq!(dashboard["uid"], "millpond");
    assert_eq!(dashboard["id"], Value::Null, "an id is the server's to give");
    assert_eq!(dashboard["graphTooltip"], 1, "the crosshair is shared");
    assert_eq!(dashboard["refresh"], "30s");
    let version = dashboard["schemaVersion"].as_u64().expect("a schema version");
    assert!((39..=41).contains(&version), "schema version {version}");
}

#[test]
fn every_metric_is_used_and_every_metric_used_is_exported() {
    let exported = Exported::read();
    let recorded: BTreeSet<String> = rules().iter().map(|rule| text(rule, "record").to_owned()).collect();
    let mut used = BTreeSet::new();
    for query in all_queries() {
        for (_, selector) in query.selectors() {
            let name = name(selector);
            let others = name.starts_with("process_") || name == "up";
            let family = exported.family(name);
            assert!(
                family.is_some() || others || recorded.contains(name),
                "{}: {name} is not exported",
                query.place
            );
            used.extend(family.map(str::to_owned));
            for label in selector.matchers.matchers.iter().filter(|label| matches!(label.op, MatchOp::Equal))
            {
                let known = label.name == "job" || others || exported.has(name, label);
                assert!(known, "{}: no {name} has {}=\"{}\"", query.place, label.name, label.value);
            }
        }
    }
    let unused: Vec<&String> = exported.types.keys().filter(|family| !used.contains(*family)).collect();
    assert!(unused.is_empty(), "exported, and shown nowhere: {unused:?}");
}

#[test]
fn every_alert_says_how_bad_it_is_and_where_to_read_on() {
    let readme = read("dashboards/README.md");
    let headings: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim())
        .collect();
    for alert in alerts() {
        let name = text(&alert, "alert");
        assert!(["page", "ticket"].contains(&text(&alert["labels"], "severity")), "{name}: no severity");
        let annotations = &alert["annotations"];
        assert!(!text(annotations, "summary").is_empty(), "{name}: no summary");
        let description = text(annotations, "description");
        assert!(description.contains("$value }}"), "{name}: a description without the value");
        assert!(!description.contains("humanize"), "{name}: humanize writes 0.1 as 100m");
        let runbook = text(annotations, "runbook_url");
        assert_eq!(runbook, format!("dashboards/README.md#{}", name.to_lowercase()), "{name}");
        assert!(headings.contains(&name), "{name}: no section of dashboards/README.md");
    }
    for heading in headings.iter().filter(|heading| heading.starts_with("Millpond")) {
        assert!(
            alerts().iter().any(|alert| text(alert, "alert") == *heading),
            "a section on no alert: {heading}"
        );
    }
}

/// A firing case counts for the rule whose labels it expects, since alerts of one name may differ in severity.
#[test]
fn every_alert_has_a_case_that_fires_and_one_that_is_silent() {
    let tests = yaml("dashboards/prometheus/tests.yml");
    let cases: Vec<&Value> =
        list(&tests, "tests").iter().flat_map(|test| list(test, "alert_rule_test")).collect();
    for alert in alerts() {
        let name = text(&alert, "alert");
        let labels = alert["labels"].as_object().expect("labels");
        let of_this_name = || cases.iter().filter(|case| text(case, "alertname") == name);
        let expected: Vec<&Value> = of_this_name().flat_map(|case| list(case, "exp_alerts")).collect();
        let fires = |one: &&Value| labels.iter().all(|(label, value)| one["exp_labels"][label] == *value);
        assert!(expected.iter().any(fires), "{name} {labels:?}: no case in which it fires");
        assert!(
            of_this_name().any(|case| list(case, "exp_alerts").is_empty()),
            "{name}: no case in which it is silent"
        );
    }
}

#[test]
fn every_recording_rule_is_used_and_tested() {
    let queries = all_queries();
    let tests = yaml("dashboards/prometheus/tests.yml");
    let tested: Vec<&str> = list(&tests, "tests")
        .iter()
        .flat_map(|test| list(test, "promql_expr_test"))
        .map(|case| text(case, "expr"))
        .collect();
    for rule in rules().iter().filter(|rule| !rule["record"].is_null()) {
        let record = text(rule, "record");
        assert_eq!(record.split(':').count(), 3, "{record} is not level:metric:operation");
        let reads = |query: &Query| query.selectors().iter().any(|(_, selector)| name(selector) == record);
        assert!(queries.iter().any(reads), "{record} is used by nothing");
        assert!(tested.iter().any(|expr| expr.contains(record)), "{record} has no case in tests.yml");
    }
}

#[test]
fn the_files_to_copy_fit_together() {
    let prometheus = yaml("dashboards/prometheus/prometheus.yml");
    assert_eq!(list(&prometheus, "rule_files"), ["rules.yml", "alerts.yml"]);
    let job = text(&prometheus["scrape_configs"][0], "job_name");
    for query in rule_queries() {
        for (_, selector) in query.selectors() {
            for matcher in selector.matchers.matchers.iter().filter(|matcher| matcher.name == "job") {
                assert_eq!(matcher.value, job, "{}: not the job that is scraped", query.place);
            }
        }
    }
    let source = yaml("dashboards/grafana/datasource.yml");
    let interval = &source["datasources"][0]["jsonData"]["timeInterval"];
    assert_eq!(*interval, prometheus["global"]["scrape_interval"], "Grafana knows the scrape interval");
    assert_eq!(yaml("dashboards/grafana/dashboards.yml")["providers"][0]["type"], "file");
    let alertmanager = yaml("dashboards/alertmanager.yml");
    let receivers: BTreeSet<&str> =
        list(&alertmanager, "receivers").iter().map(|one| text(one, "name")).collect();
    let route = &alertmanager["route"];
    for route in std::iter::once(route).chain(list(route, "routes")) {
        assert!(receivers.contains(text(route, "receiver")), "no receiver {}", route["receiver"]);
    }
}
