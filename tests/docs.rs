//! What the README says is so: its metrics and flags are those of the program, no more and no fewer.

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::Millpond;

/// The rows of the README's table under this heading of its first column: each row's cells, without backquotes.
fn table(heading: &str) -> Vec<Vec<String>> {
    let readme = include_str!("../README.md");
    let start = format!("| {heading} |");
    let rows = readme.lines().skip_while(|line| !line.starts_with(&start)).skip(2);
    let rows: Vec<Vec<String>> = rows
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let line = line.replace("\\|", "/").replace('`', "");
            line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "no table headed {heading}");
    rows
}

#[test]
fn the_metrics_table_is_what_is_exported() {
    let server = Millpond::start(&[]);
    let text = server.get("/metrics").body;
    let exported: BTreeSet<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE millpond_")?.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    let documented: BTreeSet<(String, String)> =
        table("name").into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    assert_eq!(documented, exported);
    for row in table("name") {
        // "pool, outcome = completed, panicked": every value named is a series.
        if let Some((labels, values)) = row[2].split_once(" = ") {
            let label = labels.rsplit(", ").next().expect("a label");
            for value in values.split(", ") {
                let pair = format!("{label}=\"{value}\"");
                let name = format!("millpond_{}{{", row[0]);
                let found = text.lines().any(|line| line.starts_with(&name) && line.contains(&pair));
                assert!(found, "no {name}{pair}");
            }
        }
    }
    for line in text.lines().filter(|line| line.starts_with("# HELP millpond_")) {
        assert!(line.len() > 40, "a help that helps nobody: {line}");
    }
}

#[test]
fn the_flags_tables_are_what_help_says() {
    agree("flag", &["--help"]);
    agree("flag of load", &["load", "--help"]);
    agree("flag of health", &["health", "--help"]);
}

/// The last column names files and, behind each, tests in it: "`faults.rs` one, another; `cli.rs` a_third".
#[test]
fn the_table_of_faults_names_tests_that_are_there() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/");
    let table = include_str!("README.md").lines().filter(|line| line.starts_with('|')).skip(2);
    let mut named = 0;
    for row in table {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        if cells[0].starts_with("**") {
            continue;
        }
        assert!(cells.len() == 4 && cells.iter().all(|cell| !cell.is_empty()), "four columns: {row}");
        for tests in cells[3].split("; ") {
            let (file, names) = tests.strip_prefix('`').and_then(|rest| rest.split_once("` ")).expect(row);
            let text = std::fs::read_to_string(format!("{folder}{file}")).expect(file);
            for name in names.split(", ") {
                let there = ["fn", "def"].iter().any(|word| text.contains(&format!("{word} {name}(")));
                assert!(there, "no test {name} in {file}");
                named += 1;
            }
        }
    }
    assert!(named > 50, "{named} tests named");
}

/// The README's table under this heading has the flags and defaults of this help.
fn agree(heading: &str, args: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_millpond")).args(args).output().expect("it runs");
    let help = String::from_utf8(output.stdout).expect("text");
    let flags = |text: &str| text.split_whitespace().find(|word| word.starts_with("--")).map(str::to_owned);
    let offered: BTreeSet<String> = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(flags)
        .filter(|flag| !matches!(flag.as_str(), "--help" | "--version"))
        .collect();
    let rows = table(heading);
    let documented: BTreeSet<String> = rows.iter().filter_map(|row| flags(&row[0])).collect();
    assert_eq!(documented, offered);
    for row in rows {
        let default = row[1].as_str();
        if default.starts_with(|first: char| first.is_ascii_digit()) {
            let flag = flags(&row[0]).expect("a flag");
            let from = help.find(&format!("{flag} ")).expect("the flag");
            let rest = &help[from..];
            let end = rest.find("\n\n      -").unwrap_or(rest.len());
            assert!(rest[..end].contains(&format!("[default: {default}]")), "{flag}: not {default}");
        }
    }
}
