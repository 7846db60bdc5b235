//! Drops the sessions of connections that are closed on the reactor's thread, on a thread that does nothing else.
//!
//! A session's destructor is the service's code: it may block, and it may panic. On the reactor's thread it would hold
//! up every connection. Worker threads drop the sessions of the connections that they close themselves.
//!
//! Guarantees:
//!
//! - The reactor never waits for a destructor, and a panic in one ends nothing.
//! - Sessions that wait to be dropped are counted. So the reactor can accept fewer connections meanwhile, and can wait for
//!   those sessions at the end of a drain.
//! - A service whose sessions need no destructor has no such thread.

use std::io;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Sender, unbounded};

use super::{Core, Note};
use crate::pool::quietly;

/// The reactor's side of the thread.
#[derive(Debug)]
pub(super) struct Reaper<Session> {
    /// `None` if sessions need no destructor. The number of connections bounds the channel: see `pending`.
    sessions: Option<Sender<(Session, Note)>>,
    /// Sessions that were handed over and are not dropped yet, as far as the reactor has read the notes.
    pending: usize,
}

impl<Session: Send + 'static> Reaper<Session> {
    /// Starts the thread, if the sessions have a destructor. It ends when the reaper is dropped and no session is left.
    ///
    /// # Errors
    ///
    /// What the system said when it refused the thread.
    pub(super) fn start(name: &str, core: Arc<Core>) -> io::Result<Self> {
        if !std::mem::needs_drop::<Session>() {
            return Ok(Reaper { sessions: None, pending: 0 });
        }
        let (sessions, dropped) = unbounded::<(Session, Note)>();
        thread::Builder::new().name(format!("mill-{name}-end")).spawn(move || {
            for (session, note) in dropped {
                quietly(|| drop(session));
                core.notify(note);
            }
        })?;
        Ok(Reaper { sessions: Some(sessions), pending: 0 })
    }

    /// Has a session dropped.
    pub(super) fn take(&mut self, session: Session) {
        if let Some(sessions) = &self.sessions {
            // The thread ends only after the sender is gone.
            let _ = sessions.send((session, Note::Dropped));
            self.pending += 1;
        }
    }

    /// For the worker on the reactor's thread: takes a session, and the note to send when it is dropped.
    pub(super) fn sender(&self) -> Option<Sender<(Session, Note)>> {
        self.sessions.clone()
    }

    /// The thread has dropped one.
    pub(super) fn note_dropped(&mut self) {
        self.pending -= 1;
    }

    /// Sessions that are not dropped yet.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }
}
