//! From the figures of the rounds to a table in Markdown.

use crate::contenders::{Contender, Kind};

/// The figures of one row: a list for each pool, with a figure for each round. NaN means that the pool has none.
pub(crate) type Figures = Vec<Vec<f64>>;

/// The width of a pool's column.
const WIDTH: usize = 14;

/// A table that is printed row by row.
pub(crate) struct Table<'a> {
    pools: &'a [Contender],
}

impl<'a> Table<'a> {
    /// Prints the header.
    pub(crate) fn begin(title: &str, pools: &'a [Contender]) -> Self {
        let names = pools.iter().map(|pool| pool.name.to_owned());
        let last = ["best crate", "kanal", "measuring"].map(str::to_owned);
        let columns = pools.len() + last.len();
        println!();
        print_line(title, names.chain(last));
        println!("| --- |{}", " ---: |".repeat(columns));
        Table { pools }
    }

    /// Prints a row: each pool's figure with its ratio to that of `execute`, and the final columns.
    pub(crate) fn row(&self, name: &str, figures: &Figures) {
        // A pool that is not measured counts as one without figures.
        let of = |kind| {
            let pool = self.pools.iter().position(|pool| pool.kind == kind);
            pool.map_or(&[][..], |pool| &figures[pool])
        };
        let ours = of(Kind::Execute);
        let ratio = |theirs: &[f64]| {
            let ratio = median(ours.iter().zip(theirs).map(|(ours, theirs)| theirs / ours).collect());
            (!ratio.is_nan()).then(|| format!("{ratio:.2}x"))
        };
        let pools = figures.iter().map(|theirs| match (median(theirs.clone()), ratio(theirs)) {
            (figure, _) if figure.is_nan() => None,
            (figure, None) => Some(format!("{figure:.0}")),
            (figure, Some(ratio)) => Some(format!("{figure:.0} ({ratio})")),
        });
        let measuring = median(ours.iter().zip(of(Kind::Untimed)).map(|(a, b)| a - b).collect());
        let last = [
            ratio(&self.best_crate(figures)),
            ratio(of(Kind::Kanal)),
            (!measuring.is_nan()).then(|| format!("{measuring:+.0}")),
        ];
        print_line(name, pools.chain(last).map(|cell| cell.unwrap_or_else(|| "-".to_owned())));
    }

    /// The best figure of the other crates in each round.
    fn best_crate(&self, figures: &Figures) -> Vec<f64> {
        let crates = self.pools.iter().zip(figures).filter(|(pool, _)| pool.kind == Kind::Crate);
        let rounds = figures.first().map_or(0, Vec::len);
        // `f64::min` ignores a NaN if it can.
        crates.fold(vec![f64::NAN; rounds], |best, (_, theirs)| {
            best.iter().zip(theirs).map(|(best, theirs)| best.min(*theirs)).collect()
        })
    }
}

fn print_line(name: &str, cells: impl Iterator<Item = String>) {
    print!("| {name:<26} |");
    cells.for_each(|cell| print!(" {cell:>WIDTH$} |"));
    println!();
}

/// The median; NaN if there are no values, or if half of them are NaN.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    f64::midpoint(at(values.len().saturating_sub(1) / 2), at(values.len() / 2))
}
