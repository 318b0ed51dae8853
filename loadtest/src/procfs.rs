//! CPU time of a process with its children, and of a core, from `/proc`.

use std::fs;
use std::io;
use std::time::Duration;

use crate::cores::Cores;

/// Reads the CPU times of one measurement; cheap enough to be used while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter {
    pub(crate) cores: Cores,
    /// `None` if the clients are connected directly to the backend.
    pub(crate) contender: Option<u32>,
}

/// CPU time since a fixed moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuReading {
    contender: Duration,
    contender_core: Duration,
    rig: Duration,
    rig_core: Duration,
}

/// CPU time used during a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuUsage {
    pub(crate) contender: Duration,
    /// Time used by other processes on our two cores: much of it makes the measurement noisy.
    pub(crate) others: Duration,
}

// === impl Meter ===

impl Meter {
    pub(crate) fn read(&self) -> io::Result<CpuReading> {
        let cores = fs::read_to_string("/proc/stat")?;
        let contender = match self.contender {
            Some(pid) => process_tree(pid).into_iter().map(process_time).sum::<io::Result<Duration>>()?,
            None => Duration::ZERO,
        };
        Ok(CpuReading {
            contender,
            contender_core: core_time(&cores, self.cores.contender).ok_or(io::ErrorKind::InvalidData)?,
            rig: process_time(std::process::id())?,
            rig_core: core_time(&cores, self.cores.rig).ok_or(io::ErrorKind::InvalidData)?,
        })
    }
}

// === impl CpuReading ===

impl CpuReading {
    pub(crate) fn until(&self, end: &Self) -> CpuUsage {
        let contender = end.contender.saturating_sub(self.contender);
        let rig = end.rig.saturating_sub(self.rig);
        let cores = end.contender_core.saturating_sub(self.contender_core)
            + end.rig_core.saturating_sub(self.rig_core);
        CpuUsage { contender, others: cores.saturating_sub(contender + rig) }
    }
}

/// Returns a process and all its descendants.
pub(crate) fn process_tree(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(pid) = family.get(next) {
        // Each thread has children of its own.
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            family.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        next += 1;
    }
    family
}

/// Returns the larger of two counts, neither of which is ever too high: the ticks include threads that have exited;
/// the nanoseconds cover only live threads, but are finer.
fn process_time(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = ticks(process_ticks(&stat).ok_or(io::ErrorKind::InvalidData)?);
    Ok(ticks.max(threads_time(pid)))
}

/// Sums the time of live threads; zero if the kernel does not report it.
fn threads_time(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|stat| stat.split_whitespace().next()?.parse().ok())
        .map(Duration::from_nanos)
        .sum()
}

/// Returns user and system time in ticks. The name before them may contain spaces and brackets.
fn process_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Returns the time of a core except idle and waiting for I/O, including time stolen by the hypervisor.
fn core_time(stat: &str, core: usize) -> Option<Duration> {
    let name = format!("cpu{core}");
    let line = stat.lines().find(|line| line.split_whitespace().next() == Some(&name))?;
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).map(|field| field.parse().ok()).collect::<Option<_>>()?;
    let &[user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields.as_slice() else {
        return None;
    };
    Some(ticks(user + nice + system + irq + softirq + steal))
}

fn ticks(count: u64) -> Duration {
    Duration::from_millis(count * 1000 / rustix::param::clock_ticks_per_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_counts_user_and_system_time() {
        let stat = "42 (a) b) R 1 42 42 0 -1 4194304 100 0 0 0 250 50 7 7 20 0 1 0 100 1000 10";
        assert_eq!(process_ticks(stat), Some(300));
        assert_eq!(process_ticks("42 (cut"), None);
    }

    #[test]
    fn core_time_excludes_idle() {
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 0 0 0 0 0 0 0 0 0\ncpu1 10 20 30 4000 500 1 2 3 0 0\n";
        assert_eq!(core_time(stat, 1), Some(ticks(66)));
        assert_eq!(core_time(stat, 2), None);
    }

    #[test]
    fn cpu_time_is_finer_than_ticks() {
        let pid = std::process::id();
        let (start, fine) = (crate::clock::Instant::now(), process_time(pid).unwrap());
        while start.elapsed() < Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        let spent = process_time(pid).unwrap() - fine;
        assert!(spent > Duration::ZERO, "{spent:?}");
        assert!(threads_time(pid) > Duration::ZERO);
    }

    #[test]
    fn process_tree_has_children_of_all_threads() {
        let child = || std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let (mut child, done) = std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let (finish, finished) = std::sync::mpsc::channel::<()>();
            // A thread that exits leaves its children to another thread.
            scope.spawn(move || {
                sender.send(child()).unwrap();
                let _ = finished.recv();
            });
            let child = receiver.recv().unwrap();
            let found = process_tree(std::process::id()).contains(&child.id());
            drop(finish);
            (child, found)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(done);
    }

    #[test]
    fn cpu_readings_are_plausible() {
        let meter = Meter { cores: Cores::choose().unwrap(), contender: Some(std::process::id()) };
        let start = meter.read().unwrap();
        assert_eq!(start.until(&start).contender, Duration::ZERO);
    }
}
