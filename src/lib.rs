//! A bounded worker pool you can see into.
