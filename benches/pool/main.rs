//! Compares thread pools: `cargo bench --bench pool`.
//!
//! `cargo bench --bench pool -- --help` lists the options. `benches/README.md` defines the rows and the columns.
//!
//! All pools run the same closures, and every pool has its turn in every round, in a new order each round. So a change
//! in what else the machine does affects all pools alike. A figure is the median over the rounds. So is a ratio, which
//! is taken within a round. By default all pools live in this process. With `--alone`, each pool and round has a
//! process of its own. Memory is always measured in a process of its own.

mod alone;
mod contenders;
mod memory;
mod options;
mod table;
mod times;

use std::process::ExitCode;

use self::contenders::{Contender, Runs};
use self::options::Options;
use self::table::{Figures, Table};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((first, rest)) if first == alone::FLAG => alone::child(rest),
        _ if arguments.iter().any(|argument| argument == "--help") => {
            println!("{}", options::HELP);
            Ok(())
        }
        _ => Options::parse(&arguments).and_then(|options| compare(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures and prints one table for each number of workers, and one for the memory.
fn compare(options: &Options) -> Result<(), String> {
    if options.scale > 1 {
        eprintln!("without `cargo bench`, this runs few jobs, and the figures mean nothing");
    }
    let rounds = options.rounds;
    println!("Medians of {rounds} rounds. In brackets: the figure divided by that of `execute`.");
    println!("Above 1.00x millpond is faster, or needs less memory.");
    for &workers in &options.workers {
        compare_times(options, workers)?;
    }
    compare_memory(options)
}

fn compare_times(options: &Options, workers: usize) -> Result<(), String> {
    let rows = options.chosen(times::rows(workers), |row| row.name);
    if rows.is_empty() {
        return Ok(());
    }
    let table = Table::begin(&format!("{workers} workers, ns a job"), &options.pools);
    if options.alone {
        let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
        let figures = take_turns(options, names.len(), |pool| {
            alone::measure(&options.pools[pool], workers, options.scale, &names)
        })?;
        names.iter().zip(&figures).for_each(|(name, figures)| table.row(name, figures));
        return Ok(());
    }
    let start = |pool: &Contender| (pool.start)(workers, times::QUEUE_CAPACITY);
    let pools: Vec<Box<dyn Runs>> = options.pools.iter().map(start).collect();
    for row in rows.iter().map(|row| row.scaled_down(options.scale)) {
        pools.iter().for_each(|pool| row.warm_up(&**pool));
        let figures = take_turns(options, 1, |pool| Ok(vec![row.measure(&*pools[pool])]))?;
        table.row(row.name, &figures[0]);
    }
    Ok(())
}

fn compare_memory(options: &Options) -> Result<(), String> {
    let rows = options.chosen(memory::ROWS, |row| row.name);
    if rows.is_empty() {
        return Ok(());
    }
    let table = Table::begin("memory, 1 worker", &options.pools);
    for row in rows {
        let figures = take_turns(options, 1, |pool| match &options.pools[pool] {
            pool if row.applies_to(pool) => alone::measure(pool, 1, options.scale, &[row.name]),
            _ => Ok(vec![f64::NAN]),
        })?;
        table.row(row.name, &figures[0]);
    }
    Ok(())
}

/// Gives every pool its turn in every round, in a new order each round. `measure` takes the number of a pool and
/// returns one figure for each row.
fn take_turns(
    options: &Options,
    rows: usize,
    mut measure: impl FnMut(usize) -> Result<Vec<f64>, String>,
) -> Result<Vec<Figures>, String> {
    let mut figures = vec![vec![Vec::new(); options.pools.len()]; rows];
    let mut order: Vec<usize> = (0..options.pools.len()).collect();
    for _ in 0..options.rounds {
        fastrand::shuffle(&mut order);
        for &pool in &order {
            for (row, figure) in figures.iter_mut().zip(measure(pool)?) {
                row[pool].push(figure);
            }
        }
    }
    Ok(figures)
}
