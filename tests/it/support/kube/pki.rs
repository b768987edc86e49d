//! The certificate authority of one API server, and its keys.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};

/// Signs the server's certificate and those of its users, and writes them into a directory.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

/// The files of a certificate and its private key.
pub(super) struct Credentials {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

impl Authority {
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = subject("virtnode-test-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let authority = Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)?,
            dir: dir.to_owned(),
        };
        fs::write(authority.certificate(), authority.issuer.pem())?;
        Ok(authority)
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    pub(super) fn server(&self) -> anyhow::Result<Credentials> {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()])?;
        params.distinguished_name = subject("kube-apiserver", None);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign("server", params)
    }

    /// For Kubernetes, the common name of a client certificate is the user and its
    /// organization is the group.
    pub(super) fn user(&self, name: &str, group: Option<&str>) -> anyhow::Result<Credentials> {
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(name, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(name, params)
    }

    fn sign(&self, name: &str, params: CertificateParams) -> anyhow::Result<Credentials> {
        let credentials = Credentials {
            certificate: self.dir.join(format!("{name}.crt")),
            key: self.dir.join(format!("{name}.key")),
        };
        let key = KeyPair::generate()?;
        fs::write(
            &credentials.certificate,
            params.signed_by(&key, &self.issuer)?.pem(),
        )?;
        fs::write(&credentials.key, key.serialize_pem())?;
        Ok(credentials)
    }
}

/// The private key that signs the tokens of service accounts and the public one that
/// verifies them, in the files `service-accounts.key` and `service-accounts.pub`.
pub(super) fn write_token_keys(dir: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    fs::write(dir.join("service-accounts.key"), key.serialize_pem())?;
    fs::write(dir.join("service-accounts.pub"), key.public_key_pem())?;
    Ok(())
}

fn subject(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject
}
