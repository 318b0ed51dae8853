//! Roles of a target's pods, where not all of them do the same: prefill and decode.

use std::collections::BTreeMap;

/// Labels, all of which a pod must have.
type PodLabels = BTreeMap<String, String>;

/// Pods of a target that serve, and pods that must be ready for that. By default every pod serves, and one is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Roles {
    /// The labels of the pods that requests go to. Empty: all pods.
    pub serve: PodLabels,
    /// Groups of pods by name. The target is up while each of them has a pod that is ready.
    pub groups: BTreeMap<String, PodLabels>,
}

/// Purpose of one pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Role {
    /// True if the pod serves no requests itself, but pods that serve need it (prefill).
    pub is_helper: bool,
    /// Bit set of the groups to which the pod belongs, in the order of their names.
    pub groups: u8,
}

// === impl Roles ===

impl Roles {
    /// Maximum number of groups.
    pub const MAX_GROUPS: usize = 8;

    /// Returns whether every pod serves, and one is enough.
    pub fn is_plain(&self) -> bool {
        self.serve.is_empty() && self.groups.is_empty()
    }

    /// Returns the role of a pod with these labels; `None` if the pod is irrelevant to the target.
    pub fn of(&self, labels: Option<&PodLabels>) -> Option<Role> {
        let has =
            |(key, value): (&String, &String)| labels.is_some_and(|labels| labels.get(key) == Some(value));
        let serves = self.serve.iter().all(has);
        let groups = self.groups.values().enumerate();
        let groups = groups.filter(|(_, labels)| labels.iter().all(has));
        let groups = groups.take(Self::MAX_GROUPS).fold(0, |groups, (index, _)| groups | 1 << index);
        (serves || groups != 0).then_some(Role { is_helper: !serves, groups })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> PodLabels {
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn role_follows_from_the_labels_of_a_pod() {
        let plain = Roles::default();
        assert!(plain.is_plain());
        assert_eq!(plain.of(None), Some(Role::default()));
        let groups = [("decode", "role=decode"), ("prefill", "role=prefill")];
        let groups = groups.map(|(name, of)| (name.to_owned(), labels(of))).into();
        let roles = Roles { serve: labels("role=decode"), groups };
        let of = |text: &str| roles.of(Some(&labels(text))).map(|role| (role.is_helper, role.groups));
        assert_eq!(of("role=decode app=tiny"), Some((false, 0b01)));
        assert_eq!(of("role=prefill"), Some((true, 0b10)));
        assert_eq!((of("role=router"), roles.of(None)), (None, None));
    }
}
