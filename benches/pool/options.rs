//! The options of the command line.

use crate::contenders::{CONTENDERS, Contender};
use crate::{memory, times};

pub(crate) const HELP: &str = "\
Compares thread pools: cargo bench --bench pool -- [OPTIONS]

  --rounds N         takes the medians of N rounds; the default is 11
  --only TEXT        measures the rows whose names contain TEXT
  --pools A,B        measures these pools; ratios need `execute` among them
  --workers N,M      measures tables for these numbers of workers; the default is 8,2,64
  --alone            gives each pool and round a process of its own
  --help             prints this

Started without cargo bench's own flag `--bench`, it runs a hundredth of the jobs, for one round.";

/// What to measure.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) rounds: usize,
    only: String,
    pub(crate) pools: Vec<Contender>,
    pub(crate) workers: Vec<usize>,
    pub(crate) alone: bool,
    /// By how much the numbers of jobs are divided. It is 1 unless this is a test of the benchmark itself.
    pub(crate) scale: usize,
}

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self, String> {
        // `cargo bench` passes `--bench`. `cargo test --benches` does not, and must not take long.
        let full = arguments.iter().any(|argument| argument == "--bench");
        let mut options = Options {
            rounds: if full { 11 } else { 1 },
            only: String::new(),
            pools: CONTENDERS.to_vec(),
            workers: vec![8, 2, 64],
            alone: false,
            scale: if full { 1 } else { 100 },
        };
        let mut arguments = arguments.iter();
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value"));
            match name.as_str() {
                "--bench" => {}
                "--alone" => options.alone = true,
                "--only" => options.only.clone_from(value()?),
                "--rounds" => options.rounds = positive(value()?)?,
                "--workers" => options.workers = list(value()?, positive)?,
                "--pools" => options.pools = list(value()?, contender)?,
                _ => return Err(format!("unknown option {name}\n\n{HELP}")),
            }
        }
        options.check_only()?;
        Ok(options)
    }

    /// The rows that `--only` chooses.
    pub(crate) fn chosen<R>(
        &self,
        rows: impl IntoIterator<Item = R>,
        name: fn(&R) -> &'static str,
    ) -> Vec<R> {
        rows.into_iter().filter(|row| name(row).contains(&self.only)).collect()
    }

    fn check_only(&self) -> Result<(), String> {
        let mut names: Vec<&str> = memory::ROWS.iter().map(|row| row.name).collect();
        for &workers in &self.workers {
            names.extend(times::rows(workers).iter().map(|row| row.name));
        }
        if names.iter().any(|name| name.contains(&self.only)) {
            return Ok(());
        }
        names.sort_unstable();
        names.dedup();
        Err(format!("no row has {:?} in its name; the rows are:\n{}", self.only, names.join("\n")))
    }
}

fn list<T>(text: &str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(parse).collect()
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text:?} is no number above 0")),
    }
}

fn contender(name: &str) -> Result<Contender, String> {
    let found = CONTENDERS.iter().find(|contender| contender.name == name).copied();
    let names = CONTENDERS.map(|contender| contender.name);
    found.ok_or_else(|| format!("unknown pool {name:?}; the pools are {}", names.join(", ")))
}
