//! From readings to metric families.
//!
//! A [`Source`] writes its samples on a [`Page`], and [`collector`] makes a `prometheus` collector of it. The page
//! keeps the samples of one family together, in whatever order the source writes them. A name keeps the help and
//! the type of its first sample.
//!
//! [`together`] makes one collector of several. A registry takes a collector whole or not at all, so they are in it
//! all together or none is. That holds for a scrape at the same moment too.

use std::collections::HashMap;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::Reading;
use crate::clock::seconds;

/// A module that measures something and can write its numbers at any time.
///
/// `read` runs while the registry is locked: it must not block, panic or use the registry.
pub(crate) trait Source: Send + Sync {
    /// Writes every sample on the page. The set of names and labels is the same at every call.
    fn read(&self, page: &mut Page);
}

/// Makes a collector of a source. Each sample gets these labels too, for example `[("pool", "echo")]`.
pub(crate) fn collector(source: impl Source + 'static, labels: &[(&str, &str)]) -> Box<dyn Collector> {
    let mut page = Page::default();
    source.read(&mut page);
    let descs = page.families.iter().map(|family| describe(family, labels)).collect();
    let labels = labels.iter().map(|(name, value)| pair(name, value)).collect();
    Box::new(Sheet { source, labels, descs })
}

/// Makes a collector that its registry tells apart from others of the same metrics. A registry knows a collector by its
/// descriptions. So this one has one more, without samples, that differs by `id`.
pub(crate) fn identified(collector: Box<dyn Collector>, id: u64) -> Box<dyn Collector> {
    let labels = HashMap::from([("id".to_owned(), id.to_string())]);
    let identity =
        Desc::new("millpond_identity".to_owned(), "Has no samples.".to_owned(), Vec::new(), labels)
            .expect("name, label and help are literals of this crate, and valid");
    Box::new(Identified { collector, identity })
}

/// Makes one collector of several, for a registry to take or to refuse as a whole.
pub(crate) fn together(collectors: Vec<Box<dyn Collector>>) -> Box<dyn Collector> {
    Box::new(Together(collectors))
}

/// The samples of one reading.
#[derive(Debug, Default)]
pub(crate) struct Page {
    families: Vec<MetricFamily>,
    by_name: HashMap<&'static str, usize>,
}

impl Page {
    /// Writes a sample of a counter.
    #[expect(clippy::cast_precision_loss, reason = "the text format counts in doubles")]
    pub(crate) fn counter(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[(&'static str, &str)],
        value: u64,
    ) {
        self.counter_seconds(name, help, labels, value as f64);
    }

    /// Writes a sample of a counter of seconds, or of another quantity that is not a whole number.
    pub(crate) fn counter_seconds(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[(&'static str, &str)],
        value: f64,
    ) {
        let mut metric = Metric::default();
        let mut counter = prometheus::proto::Counter::default();
        counter.set_value(value);
        metric.set_counter(counter);
        self.push(name, help, MetricType::COUNTER, labels, metric);
    }

    /// Writes a sample of a gauge.
    pub(crate) fn gauge(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[(&'static str, &str)],
        value: f64,
    ) {
        let mut metric = Metric::default();
        let mut gauge = prometheus::proto::Gauge::default();
        gauge.set_value(value);
        metric.set_gauge(gauge);
        self.push(name, help, MetricType::GAUGE, labels, metric);
    }

    /// Writes a histogram, in seconds. Its buckets are cumulative, and its count is the count of its last bucket by
    /// construction.
    pub(crate) fn histogram<const N: usize>(&mut self, name: &'static str, help: &str, reading: &Reading<N>) {
        let mut count = 0;
        let buckets = reading.bounds_ns.iter().zip(reading.counts).map(|(bound_ns, in_bucket)| {
            count += in_bucket;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(seconds(*bound_ns));
            bucket.set_cumulative_count(count);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(count + reading.beyond);
        histogram.set_sample_sum(seconds(reading.sum_ns));
        let mut metric = Metric::default();
        metric.set_histogram(histogram);
        self.push(name, help, MetricType::HISTOGRAM, &[], metric);
    }

    fn push(
        &mut self,
        name: &'static str,
        help: &str,
        kind: MetricType,
        labels: &[(&'static str, &str)],
        mut metric: Metric,
    ) {
        metric.set_label(labels.iter().map(|(name, value)| pair(name, value)).collect());
        let at = *self.by_name.entry(name).or_insert_with(|| {
            let mut family = MetricFamily::default();
            family.set_name(name.to_owned());
            family.set_help(help.to_owned());
            family.set_field_type(kind);
            self.families.push(family);
            self.families.len() - 1
        });
        self.families[at].mut_metric().push(metric);
    }
}

/// A source, and what a registry asks about it.
struct Sheet<S> {
    source: S,
    labels: Vec<LabelPair>,
    descs: Vec<Desc>,
}

impl<S: Source> Collector for Sheet<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut page = Page::default();
        self.source.read(&mut page);
        for metric in page.families.iter_mut().flat_map(MetricFamily::mut_metric) {
            let mut labels = self.labels.clone();
            labels.extend(metric.take_label());
            metric.set_label(labels);
        }
        page.families
    }
}

/// Several collectors as one.
struct Together(Vec<Box<dyn Collector>>);

impl Collector for Together {
    fn desc(&self) -> Vec<&Desc> {
        self.0.iter().flat_map(|collector| collector.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.iter().flat_map(|collector| collector.collect()).collect()
    }
}

/// A collector with one description more.
struct Identified {
    collector: Box<dyn Collector>,
    identity: Desc,
}

impl Collector for Identified {
    fn desc(&self) -> Vec<&Desc> {
        let mut descs = self.collector.desc();
        descs.push(&self.identity);
        descs
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.collector.collect()
    }
}

fn describe(family: &MetricFamily, labels: &[(&str, &str)]) -> Desc {
    let sample = &family.get_metric()[0];
    let variable = sample.get_label().iter().map(|label| label.name().to_owned()).collect();
    let constant = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Desc::new(family.name().to_owned(), family.help().to_owned(), variable, constant)
        .expect("metric names, labels and help are literals of this crate, and valid")
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sample(u64);

    impl Source for Sample {
        fn read(&self, page: &mut Page) {
            page.counter("jobs_total", "Jobs.", &[("outcome", "good")], self.0);
            page.gauge("depth", "Depth.", &[], 2.0);
            page.counter("jobs_total", "Jobs.", &[("outcome", "bad")], 1);
            let mut reading = Reading::new(&crate::metrics::LIFETIME_BOUNDS_NS);
            (reading.counts[1], reading.beyond, reading.sum_ns) = (3, 1, 2_500_000_000);
            page.histogram("life_seconds", "Life.", &reading);
        }
    }

    fn text_of(registry: &prometheus::Registry) -> String {
        prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text")
    }

    #[test]
    fn two_sources_with_different_labels_share_their_families() {
        let registry = prometheus::Registry::new();
        registry.register(collector(Sample(3), &[("pool", "one")])).expect("the first is accepted");
        registry.register(collector(Sample(4), &[("pool", "two")])).expect("the second is accepted");
        registry.register(collector(Sample(5), &[("pool", "two")])).expect_err("the same labels twice");
        let text = text_of(&registry);
        assert_eq!(text.matches("# TYPE jobs_total counter").count(), 1, "{text}");
        for line in [
            "jobs_total{pool=\"one\",outcome=\"good\"} 3",
            "jobs_total{pool=\"two\",outcome=\"bad\"} 1",
            "depth{pool=\"two\"} 2",
            "life_seconds_bucket{pool=\"one\",le=\"0.001\"} 0",
            "life_seconds_bucket{pool=\"one\",le=\"0.01\"} 3",
            "life_seconds_bucket{pool=\"one\",le=\"+Inf\"} 4",
            "life_seconds_count{pool=\"one\"} 4",
            "life_seconds_sum{pool=\"one\"} 2.5",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
        }
    }

    #[test]
    fn a_registry_takes_collectors_together_or_takes_none_of_them() {
        let three =
            || together(["one", "two", "three"].map(|pool| collector(Sample(1), &[("pool", pool)])).into());
        let registry = prometheus::Registry::new();
        registry.register(collector(Sample(9), &[("pool", "three")])).expect("it is the first");
        registry.register(three()).expect_err("the registry has one of the three");
        registry.unregister(three()).expect_err("they are not in the registry");
        let text = text_of(&registry);
        assert!(text.contains("pool=\"three\"") && !text.contains("one") && !text.contains("two"), "{text}");
        registry.unregister(collector(Sample(0), &[("pool", "three")])).expect("it is there");
        registry.register(three()).expect("none of them is there");
        for pool in ["one", "two", "three"] {
            assert!(text_of(&registry).contains(&format!("depth{{pool=\"{pool}\"}} 2")));
        }
        registry.unregister(three()).expect("they are there");
        assert_eq!(text_of(&registry), "");
    }

    #[test]
    fn a_collector_does_not_unregister_another_of_the_same_metrics() {
        let one = |id| identified(collector(Sample(id), &[("pool", "one")]), id);
        let registry = prometheus::Registry::new();
        registry.register(one(1)).expect("it is the first");
        registry.register(one(2)).expect_err("the same metrics twice");
        registry.unregister(one(2)).expect_err("it is another");
        assert!(text_of(&registry).contains("jobs_total{pool=\"one\",outcome=\"good\"} 1"));
        registry.unregister(one(1)).expect("it is there");
        registry.register(one(2)).expect("the first is gone");
        assert!(!text_of(&registry).contains("identity"), "{}", text_of(&registry));
    }

    /// The sum of the durations is beyond 64 bits, and is the exact number of seconds that a double holds.
    #[test]
    fn a_sum_beyond_64_bits_is_written_whole() {
        struct Long;
        impl Source for Long {
            fn read(&self, page: &mut Page) {
                let life = crate::metrics::Lifetime::new(&crate::metrics::LIFETIME_BOUNDS_NS);
                (0..8).for_each(|_| life.observe(9_000_000_000_000_000_000));
                let mut reading = Reading::new(&crate::metrics::LIFETIME_BOUNDS_NS);
                life.add_to(&mut reading);
                page.histogram("life_seconds", "Life.", &reading);
            }
        }
        let registry = prometheus::Registry::new();
        registry.register(collector(Long, &[])).expect("it is the first");
        let text = text_of(&registry);
        assert!(text.lines().any(|line| line == "life_seconds_sum 72000000000"), "{text}");
    }
}
