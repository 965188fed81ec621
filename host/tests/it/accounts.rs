//! `source.assume_role` through the real binary: STS is called as the file says, and Kinesis is called with the
//! role's credentials that STS returned.

use std::path::Path;
use std::process::Output;

use crate::support::pipeline::PipelineToml;
use crate::support::player::{Player, Seen};
use crate::support::shardmill;
use hyper::StatusCode;

const ROLE: &str = "arn:aws:iam::123456789012:role/reader";
const ASSUMED_KEY: &str = "ASIAROLEOFTHETEST000";

/// Response of STS.
///
/// Source: AWS STS API reference, AssumeRole.
const ASSUMED: &str = r#"<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleResult>
<AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/reader/nightly</Arn>
<AssumedRoleId>AROA:nightly</AssumedRoleId></AssumedRoleUser>
<Credentials><AccessKeyId>ASIAROLEOFTHETEST000</AccessKeyId>
<SecretAccessKey>secret</SecretAccessKey><SessionToken>token-of-the-role</SessionToken>
<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials>
</AssumeRoleResult></AssumeRoleResponse>"#;
const DENIED: &str = r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error>
<Type>Sender</Type><Code>AccessDenied</Code><Message>not for you</Message></Error></ErrorResponse>"#;
const SUMMARY: &str = r#"{"StreamDescriptionSummary":{"StreamName":"test","StreamARN":
"arn:aws:kinesis:eu-west-1:123456789012:stream/test","StreamStatus":"ACTIVE",
"RetentionPeriodHours":24,"StreamCreationTimestamp":1700000000,"EnhancedMonitoring":[],
"OpenShardCount":0}}"#;

fn kinesis(seen: &Seen) -> (StatusCode, &'static str) {
    match seen.target.ends_with(".DescribeStreamSummary") {
        true => (StatusCode::OK, SUMMARY),
        false => (StatusCode::OK, r#"{"Shards":[]}"#),
    }
}

/// Describes the stream of a pipeline that assumes a role.
fn describe(folder: &Path, kinesis: &Player, sts: &Player, assume_role: &str) -> Output {
    let role = format!("region = \"eu-west-1\"\nassume_role = {assume_role}");
    let file = PipelineToml::new(folder, "accounts")
        .timing("")
        .stream("test", &kinesis.url, &role)
        .plain_sink("nothing", "type = \"discard\"")
        .write();
    crate::support::output(
        shardmill(&["stream", "describe", "--json", "--pipeline", &file])
            .env("AWS_ENDPOINT_URL_STS", &sts.url)
            .env("AWS_ACCESS_KEY_ID", "AKIAOFTHECALLER00000")
            .env("AWS_SECRET_ACCESS_KEY", "secret"),
    )
}

#[test]
fn kinesis_is_asked_by_the_role_that_sts_gave() {
    let folder = tempfile::tempdir().expect("a folder");
    let (kinesis, sts) = (Player::start(kinesis), Player::start(|_| (StatusCode::OK, ASSUMED)));
    let role = format!(r#"{{ arn = "{ROLE}", external_id = "cars-7", session_name = "nightly" }}"#);
    let output = describe(folder.path(), &kinesis, &sts, &role);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let asked = sts.seen();
    assert!(!asked.is_empty());
    for asked in asked {
        let member = |name: &str| {
            let mut members = url::form_urlencoded::parse(asked.body.as_bytes());
            members.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        assert_eq!(member("Action").as_deref(), Some("AssumeRole"));
        assert_eq!(member("RoleArn").as_deref(), Some(ROLE));
        assert_eq!(member("ExternalId").as_deref(), Some("cars-7"));
        assert_eq!(member("RoleSessionName").as_deref(), Some("nightly"));
        assert!(asked.authorization.contains("Credential=AKIAOFTHECALLER00000/"), "{asked:?}");
    }
    let asked = kinesis.seen();
    assert_eq!(asked.len(), 2, "{asked:?}");
    for asked in asked {
        let expected = format!("Credential={ASSUMED_KEY}/");
        assert!(asked.authorization.contains(&expected), "{asked:?}");
        assert_eq!(asked.token, "token-of-the-role");
    }
}

#[test]
fn a_role_that_sts_denies_is_named_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let sts = Player::start(|_| (StatusCode::FORBIDDEN, DENIED));
    let kinesis = Player::start(kinesis);
    let output = describe(folder.path(), &kinesis, &sts, &format!(r#"{{ arn = "{ROLE}" }}"#));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(ROLE) && said.contains("not for you"), "{said}");
    assert!(kinesis.seen().is_empty(), "nobody else's credentials are tried");
}
