//! Assignment of cores: one for the contender, one for the load test, a third for an attacker if available.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::LoadtestError;

/// Cores of a run, taken in order from those that this process may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    /// Core of the contender alone.
    pub(crate) contender: usize,
    /// Core of the clients and the backend.
    pub(crate) rig: usize,
    /// Core of malicious clients: the third if there is one, else the rig's.
    pub(crate) attacker: usize,
}

// === impl Cores ===

impl Cores {
    pub(crate) fn choose() -> Result<Self, LoadtestError> {
        let allowed =
            sched_getaffinity(None).map_err(|error| LoadtestError::io("read the allowed cores", error))?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        match (cores.next(), cores.next()) {
            (Some(contender), Some(rig)) => {
                Ok(Self { contender, rig, attacker: cores.next().unwrap_or(rig) })
            }
            (first, _) => Err(LoadtestError::Cores(first.iter().count())),
        }
    }
}

/// Moves the calling thread to `core`. A child process inherits the core of the thread that starts it.
pub(crate) fn pin(core: usize) -> Result<(), LoadtestError> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).map_err(|error| LoadtestError::io(format!("move to core {core}"), error))
}
