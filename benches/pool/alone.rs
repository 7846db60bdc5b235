//! One pool in a process of its own: this program, which starts itself with [`FLAG`] first.
//!
//! The child prints one line for each row: the name, a tab, and the figure. No child outlives its purpose:
//!
//! - The parent kills a child by its process id after [`DEADLINE`], and if the parent itself fails.
//! - If the parent is killed, the child's standard input ends, and the child exits.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::contenders::{CONTENDERS, Contender};
use crate::{memory, times};

/// The first argument of a child. The others are the pool, the number of workers, the scale, and the names of the rows.
pub(crate) const FLAG: &str = "--measure";

/// How long a child may take for all its rows. It needs a few seconds, and more on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A child that is killed when this is dropped, unless it has ended.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // If the child has been waited for, both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a child that measures these rows of a pool, and returns its figures.
pub(crate) fn measure(
    pool: &Contender,
    workers: usize,
    scale: usize,
    rows: &[&str],
) -> Result<Vec<f64>, String> {
    let failed = |why: String| format!("{} with {workers} workers, {}: {why}", pool.name, rows.join("; "));
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command.args([FLAG, pool.name, &workers.to_string(), &scale.to_string()]).args(rows);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = KillOnDrop(child.map_err(|error| failed(error.to_string()))?);

    let mut stdout = child.0.stdout.take().expect("it is piped");
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut lines = String::new();
        let result = stdout.read_to_string(&mut lines).map(|_| lines);
        // The receiver is gone if the deadline has passed.
        let _ = send.send(result);
    });
    let lines = receive
        .recv_timeout(DEADLINE)
        .map_err(|_| failed(format!("it was killed after {} s", DEADLINE.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    // The child's output has ended, so the child is about to end.
    let status = child.0.wait().map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("its process ended with {status}")));
    }
    let figures = lines.lines().zip(rows).map(|(line, row)| figure(line, row));
    let figures: Option<Vec<f64>> = figures.collect();
    figures
        .filter(|figures| figures.len() == rows.len())
        .ok_or_else(|| failed(format!("it printed {lines:?}")))
}

/// Reads the figure of this row from a line that a child has printed.
fn figure(line: &str, row: &str) -> Option<f64> {
    line.strip_prefix(row)?.strip_prefix('\t')?.parse().ok()
}

/// Measures what the arguments after [`FLAG`] ask for, and prints it.
pub(crate) fn child(arguments: &[String]) -> Result<(), String> {
    thread::spawn(|| {
        // The parent writes nothing, so this blocks until the parent has ended.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    let wrong = || format!("wrong arguments after {FLAG}: {arguments:?}");
    let [pool, workers, scale, names @ ..] = arguments else { return Err(wrong()) };
    let pool = CONTENDERS.iter().find(|contender| contender.name == pool).ok_or_else(wrong)?;
    let workers = workers.parse().map_err(|_| wrong())?;
    let scale = scale.parse().map_err(|_| wrong())?;
    if let [name] = names
        && let Some(row) = memory::ROWS.iter().find(|row| row.name == name)
    {
        println!("{name}\t{}", row.measure(pool, scale));
        return Ok(());
    }
    let rows = times::rows(workers);
    let started = (pool.start)(workers, times::QUEUE_CAPACITY);
    for name in names {
        let row = rows.iter().find(|row| row.name == name).ok_or_else(wrong)?.scaled_down(scale);
        row.warm_up(&*started);
        println!("{name}\t{}", row.measure(&*started));
    }
    Ok(())
}
