//! How long a slot has waited for a byte of an answer, over all of its connections.
//!
//! A silence begins when the slot wants an answer, or wants a connection to get one. It goes on through everything that
//! goes wrong meanwhile: resets, refused connections, and the pauses before the next attempt. Only a byte of an answer
//! ends it, or the end of the run. There is one exception: if no answer was wanted in it, a new connection ends it too.

/// The silence that a slot is in, if it wants something.
#[derive(Debug, Default)]
pub(super) struct Silence {
    since_ns: Option<u64>,
    /// Whether an answer has been wanted in this silence, and not only a connection.
    for_an_answer: bool,
}

impl Silence {
    /// When the present silence began.
    pub(super) fn since_ns(&self) -> Option<u64> {
        self.since_ns
    }

    /// The slot wants a connection.
    pub(super) fn want_connection(&mut self, now_ns: u64) {
        self.since_ns.get_or_insert(now_ns);
    }

    /// The slot wants an answer.
    pub(super) fn want_answer(&mut self, now_ns: u64) {
        self.since_ns.get_or_insert(now_ns);
        self.for_an_answer = true;
    }

    /// A silence that goes on counts only from now.
    pub(super) fn restart(&mut self, now_ns: u64) {
        self.since_ns = self.since_ns.map(|_| now_ns);
    }

    /// The slot has a connection. Returns when the silence began, if this ends it.
    pub(super) fn connected(&mut self) -> Option<u64> {
        if self.for_an_answer { None } else { self.since_ns.take() }
    }

    /// A byte of an answer came. Returns when the silence began that this ends. If the slot wants more, the next one
    /// begins now.
    pub(super) fn heard(&mut self, now_ns: u64, wants_more: bool) -> Option<u64> {
        let ended = self.since_ns.take();
        self.for_an_answer = false;
        if wants_more {
            self.want_answer(now_ns);
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_for_an_answer_outlasts_failures_and_new_connections() {
        let mut silence = Silence::default();
        silence.want_answer(10);
        // The connection is reset, the next is made, and the next answer is wanted on it.
        silence.want_connection(20);
        assert_eq!(silence.connected(), None);
        silence.want_answer(30);
        assert_eq!(silence.since_ns(), Some(10));
        assert_eq!(silence.heard(40, false), Some(10));
        assert_eq!(silence.since_ns(), None);
    }

    #[test]
    fn an_answer_wanted_while_there_is_no_connection_keeps_the_silence_going() {
        let mut silence = Silence::default();
        silence.want_connection(10);
        silence.want_answer(20);
        assert_eq!(silence.connected(), None);
        assert_eq!(silence.heard(30, true), Some(10));
        assert_eq!(silence.heard(50, false), Some(30), "from one byte to the next");
    }

    #[test]
    fn a_connection_alone_ends_a_silence_in_which_no_answer_was_wanted() {
        let mut silence = Silence::default();
        silence.want_connection(10);
        assert_eq!(silence.connected(), Some(10));
        assert_eq!(silence.since_ns(), None);
        silence.want_answer(90);
        assert_eq!(silence.heard(95, false), Some(90));
        silence.want_connection(100);
        assert_eq!(silence.connected(), Some(100), "what was wanted before it was answered");
    }

    #[test]
    fn only_a_silence_that_goes_on_restarts() {
        let mut silence = Silence::default();
        silence.restart(5);
        assert_eq!(silence.since_ns(), None);
        silence.want_connection(10);
        silence.restart(50);
        assert_eq!(silence.since_ns(), Some(50));
    }
}
