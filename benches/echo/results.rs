//! From rounds to a table, a file and a picture.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use plotters::prelude::*;
use serde_json::{Value, json};

/// What one turn of one server has shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    pub(crate) rate: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Processor time of the server for each message.
    pub(crate) cpu_us: f64,
    pub(crate) resident_mib: f64,
    /// Clients that wanted an answer and never had one.
    pub(crate) never_answered: f64,
}

/// One scenario: a row for each server, the first of which the others are compared with.
pub(crate) struct Table {
    name: String,
    rows: Vec<(String, Vec<Measured>)>,
}

impl Table {
    pub(crate) fn new(name: &str, servers: impl Iterator<Item = String>) -> Self {
        Table { name: name.to_owned(), rows: servers.map(|server| (server, Vec::new())).collect() }
    }

    pub(crate) fn add(&mut self, server: usize, measured: Measured) {
        self.rows[server].1.push(measured);
    }

    fn median(&self, server: usize, what: impl Fn(&Measured) -> f64) -> f64 {
        median(self.rows[server].1.iter().map(what).collect())
    }

    /// The median of millpond's figure over this server's, each taken in the same round.
    fn ratio(&self, server: usize, what: impl Fn(&Measured) -> f64) -> f64 {
        let rounds = self.rows[0].1.iter().zip(&self.rows[server].1);
        median(rounds.map(|(ours, theirs)| what(ours) / what(theirs)).collect())
    }

    fn json(&self) -> Value {
        let rows = (0..self.rows.len()).map(|server| {
            json!({
                "server": self.rows[server].0,
                "rounds": self.rows[server].1.len(),
                "messages_per_second": self.median(server, |it| it.rate),
                "latency_p50_us": self.median(server, |it| it.p50_us),
                "latency_p99_us": self.median(server, |it| it.p99_us),
                "cpu_us_per_message": self.median(server, |it| it.cpu_us),
                "resident_mib": self.median(server, |it| it.resident_mib),
                "clients_never_answered": self.median(server, |it| it.never_answered),
                "millpond_rate_ratio": self.ratio(server, |it| it.rate),
                "millpond_p99_ratio": self.ratio(server, |it| it.p99_us),
                "millpond_cpu_ratio": self.ratio(server, |it| it.cpu_us),
            })
        });
        json!({ "scenario": self.name, "servers": rows.collect::<Vec<_>>() })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// As the README has it; the ratios are millpond's figure over the server's.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| {} | echoes/s | p50 us | p99 us | CPU us | MiB | unanswered | millpond: rate | p50 | p99 | CPU |",
            self.name
        )?;
        writeln!(f, "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")?;
        for (server, (name, _)) in self.rows.iter().enumerate() {
            writeln!(
                f,
                "| {name} | {:.0} | {:.0} | {:.0} | {:.2} | {:.1} | {:.0} | {:.2}x | {:.2}x | {:.2}x | {:.2}x |",
                self.median(server, |it| it.rate),
                self.median(server, |it| it.p50_us),
                self.median(server, |it| it.p99_us),
                self.median(server, |it| it.cpu_us),
                self.median(server, |it| it.resident_mib),
                self.median(server, |it| it.never_answered),
                self.ratio(server, |it| it.rate),
                self.ratio(server, |it| it.p50_us),
                self.ratio(server, |it| it.p99_us),
                self.ratio(server, |it| it.cpu_us),
            )?;
        }
        Ok(())
    }
}

/// Writes `<name>.json`, and `<name>.svg` where servers are compared.
pub(crate) fn save(folder: &Path, name: &str, tables: &[Table], rounds: usize, duration: Duration) {
    std::fs::create_dir_all(folder).expect("the folder");
    let results = json!({
        "revision": option_env!("MILLPOND_REVISION").unwrap_or("unknown"),
        "rounds": rounds,
        "round_seconds": duration.as_secs_f64(),
        "scenarios": tables.iter().map(Table::json).collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&results).expect("plain values") + "\n";
    std::fs::write(folder.join(format!("{name}.json")), text).expect("the file");
    if tables.iter().any(|table| table.rows.len() > 1) {
        draw(&folder.join(format!("{name}.svg")), tables).expect("the picture");
    }
}

/// Two rows of bars: echoes a second, and processor time for each, by scenario and server.
fn draw(path: &Path, tables: &[Table]) -> Result<(), Box<dyn std::error::Error>> {
    let width = u32::try_from(120 + tables.len() * 150)?;
    let area = SVGBackend::new(path, (width, 700)).into_drawing_area();
    area.fill(&WHITE)?;
    let halves = area.split_evenly((2, 1));
    bars(&halves[0], "echoes per second (thousands)", tables, |table, server| {
        table.median(server, |it| it.rate / 1e3)
    })?;
    bars(&halves[1], "server's processor time per echo (us)", tables, |table, server| {
        table.median(server, |it| it.cpu_us)
    })?;
    area.present()?;
    Ok(())
}

fn bars(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    tables: &[Table],
    value: impl Fn(&Table, usize) -> f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let most = tables.iter().map(|table| table.rows.len()).max().unwrap_or(1);
    let highest = tables.iter().flat_map(|table| (0..table.rows.len()).map(|row| value(table, row)));
    let highest = highest.fold(0.0, f64::max) * 1.1;
    #[expect(clippy::cast_precision_loss, reason = "there are few")]
    let (count, step) = (tables.len() as f64, 1.0 / (most as f64 + 1.0));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..count, 0.0..highest)?;
    let name = |at: &f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is a small index")]
        let number = at.floor() as usize;
        tables.get(number).map_or(String::new(), |table| table.name.clone())
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(tables.len() * 2 + 1)
        .x_label_formatter(&|at| if (at - at.floor() - 0.5).abs() < 0.01 { name(at) } else { String::new() })
        .draw()?;
    let mut servers: Vec<&str> = Vec::new();
    tables.iter().flat_map(|table| &table.rows).for_each(|(name, _)| {
        if !servers.contains(&name.as_str()) {
            servers.push(name);
        }
    });
    for (place, server) in servers.iter().enumerate() {
        let colour = Palette99::pick(place).mix(0.8);
        let shown = tables.iter().enumerate().filter_map(|(number, table)| {
            let row = table.rows.iter().position(|(name, _)| name == server)?;
            #[expect(clippy::cast_precision_loss, reason = "there are few")]
            let left = number as f64 + step * (row as f64 + 0.5);
            Some(Rectangle::new([(left, 0.0), (left + step * 0.9, value(table, row))], colour.filled()))
        });
        let drawn: Vec<_> = shown.collect();
        chart
            .draw_series(drawn)?
            .label(*server)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    Ok(())
}
