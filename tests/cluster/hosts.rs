//! Names for addresses: the /etc/hosts of the tests' own mount namespace, in the place of the cluster's DNS.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf};

use parking_lot::Mutex;

/// What names mean at the moment. Every process of the tests sees it, and sees it change.
pub(crate) struct Hosts {
    file: PathBuf,
    names: Mutex<BTreeMap<String, Vec<Ipv4Addr>>>,
}

// === impl Hosts ===

impl Hosts {
    /// `file` is what is mounted on /etc/hosts.
    pub(crate) fn new(file: PathBuf) -> Self {
        let hosts = Self { file, names: Mutex::default() };
        hosts.set("localhost", &[Ipv4Addr::LOCALHOST]);
        hosts
    }

    /// A name with several addresses is a headless Service; one with none does not exist.
    pub(crate) fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        let mut names = self.names.lock();
        names.insert(name.to_owned(), addresses.to_vec());
        let lines = names
            .iter()
            .flat_map(|(name, addresses)| addresses.iter().map(move |address| format!("{address} {name}\n")));
        // In place: a new file would not be the one that is mounted.
        std::fs::write(&self.file, lines.collect::<String>()).unwrap();
    }
}
