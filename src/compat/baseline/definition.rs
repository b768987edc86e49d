//! A proposed CPU in the formats of libvirt and KubeVirt.

use quick_xml::escape::escape;
use serde::Serialize;

use super::CpuProposal;

/// `spec.domain.cpu` of a virtual machine of KubeVirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KubevirtCpu {
    pub model: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<KubevirtFeature>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KubevirtFeature {
    pub name: String,
    pub policy: &'static str,
}

impl CpuProposal {
    /// Returns the `<cpu>` for a domain's definition.
    pub fn to_libvirt_xml(&self) -> String {
        let mut xml = format!(
            "<cpu mode='custom' match='exact' check='partial'>\n  <model fallback='forbid'>{}</model>\n",
            escape(&self.model)
        );
        for (name, policy) in self.policies() {
            xml.push_str(&format!(
                "  <feature policy='{policy}' name='{}'/>\n",
                escape(name)
            ));
        }
        xml + "</cpu>\n"
    }

    pub fn to_kubevirt(&self) -> KubevirtCpu {
        let feature = |(name, policy): (&str, &'static str)| KubevirtFeature {
            name: name.to_owned(),
            policy,
        };
        KubevirtCpu {
            model: self.model.clone(),
            features: self.policies().map(feature).collect(),
        }
    }

    fn policies(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let require = self.require.iter().map(|name| (name.as_str(), "require"));
        let disable = self.disable.iter().map(|name| (name.as_str(), "disable"));
        require.chain(disable)
    }
}
