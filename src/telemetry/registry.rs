//! The registry of metrics.
//!
//! Each component defines its own metrics, registers them here and starts every combination of
//! labels that can occur at zero, so that a rate over a series never misses its first increment.
//! A scrape reads memory only.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Error, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, TextEncoder,
};

/// Upper bounds of histogram buckets in seconds: from a cached answer to the first probe of
/// several emulators.
const BUCKETS: [f64; 8] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0];

/// Registry of the metrics of one daemon. Clones share it.
///
/// Registering panics if a name is invalid or taken. Names are constants, and a test registers
/// them all.
#[derive(Clone)]
pub struct MetricRegistry(prometheus::Registry);

impl MetricRegistry {
    /// Returns a registry with the metrics of the process itself.
    pub fn new() -> Self {
        let registry = Self(prometheus::Registry::new());
        let commit = option_env!("VIRTNODE_COMMIT").unwrap_or("unknown");
        let help = "Always 1; the labels name the running version.";
        let info = Opts::new("virtnode_build_info", help)
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("commit", commit);
        registry.add(IntGauge::with_opts(info)).set(1);
        registry.collect(ProcessCollector::for_self());
        registry
    }

    /// Returns the metrics in text format 0.0.4.
    ///
    /// # Errors
    /// A collector returned a malformed family.
    pub fn encode(&self) -> Result<String, Error> {
        TextEncoder::new().encode_to_string(&self.0.gather())
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    pub fn float_gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    /// Returns gauges that start at 0 for each combination of these labels' values.
    pub fn gauges(&self, name: &str, help: &str, labels: Labels<'_>) -> IntGaugeVec {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &names(labels));
        self.add_series(gauges, labels)
    }

    /// As [`Self::gauges`].
    pub fn float_gauges(&self, name: &str, help: &str, labels: Labels<'_>) -> GaugeVec {
        let gauges = GaugeVec::new(Opts::new(name, help), &names(labels));
        self.add_series(gauges, labels)
    }

    /// As [`Self::gauges`].
    pub fn counters(&self, name: &str, help: &str, labels: Labels<'_>) -> IntCounterVec {
        let counters = IntCounterVec::new(Opts::new(name, help), &names(labels));
        self.add_series(counters, labels)
    }

    /// As [`Self::gauges`].
    pub fn histograms(&self, name: &str, help: &str, labels: Labels<'_>) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(BUCKETS.into());
        self.add_series(HistogramVec::new(options, &names(labels)), labels)
    }

    fn add_series<T: MetricVecBuilder + 'static>(
        &self,
        metrics: Result<MetricVec<T>, Error>,
        labels: Labels<'_>,
    ) -> MetricVec<T> {
        let metrics = self.add(metrics);
        let mut series = vec![Vec::new()];
        for (_, values) in labels {
            let extended = series.iter().flat_map(|before: &Vec<&str>| {
                values.iter().map(|value| [before, &[*value][..]].concat())
            });
            series = extended.collect();
        }
        for values in series {
            drop(metrics.with_label_values(&values));
        }
        metrics
    }

    #[expect(clippy::expect_used, reason = "names and labels are constants")]
    fn add<C: Collector + Clone + 'static>(&self, collector: Result<C, Error>) -> C {
        let collector = collector.expect("the metric's name and labels are valid");
        self.collect(collector.clone());
        collector
    }

    /// Removes a metric that does not apply to this node, so that its value cannot be misread.
    pub fn remove(&self, collector: &(impl Collector + Clone + 'static)) {
        // Fails only for a metric that is not registered.
        let _absent = self.0.unregister(Box::new(collector.clone()));
    }

    /// Registers a collector of several metrics.
    #[expect(clippy::expect_used, reason = "names are constants")]
    pub fn collect(&self, collector: impl Collector + 'static) {
        let registered = self.0.register(Box::new(collector));
        registered.expect("the metric's name is unique");
    }
}

/// The labels of a metric, each with the values whose series exist from the start.
pub(super) type Labels<'l> = &'l [(&'l str, &'l [&'l str])];

fn names<'l>(labels: Labels<'l>) -> Vec<&'l str> {
    labels.iter().map(|(name, _)| *name).collect()
}

impl Default for MetricRegistry {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns seconds since 1970, the timestamps of Prometheus.
pub fn now_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
