//! The program's modules name the revision they are built from.

fn main() {
    println!("cargo:rustc-env=MILLPOND_REVISION=fuzzing");
}
