"""The small path: API Gateway's REST API before the Lambda function `api`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from aws_cdk import Duration
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_codedeploy as codedeploy
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra.constructs.container import log_group
from infra.constructs.data import Data
from infra.constructs.function import Function
from infra.constructs.network import Network
from infra.constructs.rules import acknowledge
from infra.environments import Environment
from voxgate import errors

_Type = apigateway.ResponseType


class Api(Construct):
    """`function` is called by its `alias` alone; `network` is given where it has to reach the inference
    service. `alarms` are those that take a release back in production; whoever is paged may have them too."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        data: Data,
        variables: Mapping[str, str],
        layer: lambda_.ILayerVersion,
        network: Network | None = None,
    ) -> None:
        super().__init__(scope, id)
        sizes = environment.api
        host = Function(
            self,
            "Host",
            environment=environment,
            layer=layer,
            handler="api.handler.handler",
            description="The five contracts' paths, for what fits into an event",
            memory=sizes.memory,
            timeout_seconds=sizes.timeout_seconds,
            variables={
                "VOXGATE_ENVIRONMENT": environment.name,
                "VOXGATE_EMBEDDED": "0",  # no recognizer in the layer
                **variables,
                # Holds and places are leased for twice this and a minute: no longer than one can be here.
                "VOXGATE_REQUEST_TIMEOUT": str(sizes.timeout_seconds),
            },
            reserved_concurrency=sizes.reserved_concurrency,
            network=network,
        )
        data.allow_gateway(host.role)
        self.function, self.alias, self.log_group = host.function, host.alias, host.log_group
        self.access_log = log_group(self, "AccessLog", environment=environment)
        self.rest_api = self._rest_api(environment)
        self._route()
        self._speak(environment)
        self.alarms = self._canary() if sizes.canary else []

    def _rest_api(self, environment: Environment) -> apigateway.RestApi:
        api = apigateway.RestApi(
            self,
            "RestApi",
            rest_api_name=f"voxgate-{environment.name}",
            description="The small path, behind CloudFront",
            endpoint_types=[apigateway.EndpointType.REGIONAL],
            # All of them: audio comes as multipart and as `application/octet-stream`, and a type that is
            # not listed reaches the function as text, which destroys it.
            binary_media_types=["*/*"],
            cloud_watch_role=True,
            deploy_options=apigateway.StageOptions(
                stage_name="live",
                tracing_enabled=True,
                metrics_enabled=True,
                # A backstop for the whole API: what a customer may is the application's to say.
                throttling_rate_limit=environment.api.requests_per_second,
                throttling_burst_limit=environment.api.burst,
                access_log_destination=apigateway.LogGroupLogDestination(self.access_log),
                access_log_format=_access_log_format(),
                # The execution log would have headers in it, and with them customers' keys.
                logging_level=apigateway.MethodLoggingLevel.OFF,
                data_trace_enabled=False,
            ),
        )
        acknowledge(
            api,
            "APIG2",
            "The bodies are multipart forms with audio, of which API Gateway can validate nothing; the application "
            "checks every field, and answers in the contracts' own words.",
        )
        acknowledge(
            api.deployment_stage,
            "APIG6",
            "The execution log writes headers, in which customers send their keys. The access log has each request's "
            "id, status, latency and the integration's error instead.",
        )
        role = api.node.find_child("CloudWatchRole")
        acknowledge(
            role,
            "IAM4",
            "API Gateway takes a role for its account-wide log only with the rights of just this policy.",
            "Policy::arn:<AWS::Partition>:iam::aws:policy/service-role/AmazonAPIGatewayPushToCloudWatchLogs",
        )
        return api

    def _route(self) -> None:
        """Everything to the application, which knows the paths and says so in the envelope."""
        integration = apigateway.LambdaIntegration(self.alias, proxy=True, allow_test_invoke=False)
        root = self.rest_api.root
        proxy = root.add_resource("{proxy+}")
        for method in (root.add_method("ANY", integration), proxy.add_method("ANY", integration)):
            for rule in ("APIG4", "COG4"):
                acknowledge(
                    method,
                    rule,
                    "Customers' keys are checked by the application, before a byte of the body is read: it knows the "
                    "five contracts' ways of sending them, and their accounts. Health and the description are public.",
                )

    def _speak(self, environment: Environment) -> None:
        """What API Gateway refuses, it refuses in our envelope."""
        for name, (error, status) in _responses(environment).items():
            apigateway.GatewayResponse(
                self,
                f"Answer{name}",
                rest_api=self.rest_api,
                type=_Type.of(name),
                status_code=status,
                response_headers={
                    "x-request-id": "context.requestId",
                    **{key: f"'{value}'" for key, value in error.headers.items()},
                },
                templates={"application/json": json.dumps(error.envelope())},
            )

    def _canary(self) -> list[cloudwatch.Alarm]:
        """A tenth of the traffic for five minutes, and back again where that goes wrong."""
        alarms = [
            cloudwatch.Alarm(
                self,
                "FunctionFails",
                alarm_description="The function `api` ends without an answer: a release that does so is taken back.",
                metric=self.alias.metric_errors(period=Duration.minutes(1), statistic="Sum"),
                threshold=1,
                evaluation_periods=1,
                comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
            ),
            cloudwatch.Alarm(
                self,
                "ManyServerErrors",
                alarm_description="More than 5 percent of the REST API's answers are 5xx.",
                metric=self.rest_api.metric_server_error(period=Duration.minutes(1), statistic="Average"),
                threshold=0.05,
                evaluation_periods=2,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
            ),
        ]
        group = codedeploy.LambdaDeploymentGroup(
            self,
            "Canary",
            alias=self.alias,
            alarms=list[cloudwatch.IAlarm](alarms),
            deployment_config=codedeploy.LambdaDeploymentConfig.CANARY_10_PERCENT_5_MINUTES,
            auto_rollback=codedeploy.AutoRollbackConfig(
                failed_deployment=True, stopped_deployment=True, deployment_in_alarm=True
            ),
        )
        acknowledge(
            group,
            "IAM4",
            "AWS's policy for CodeDeploy on Lambda, the limited one: it shifts aliases and reads alarms.",
            "Policy::arn:<AWS::Partition>:iam::aws:policy/service-role/AWSCodeDeployRoleForLambdaLimited",
        )
        return alarms


def _access_log_format() -> apigateway.AccessLogFormat:
    field = apigateway.AccessLogField
    # Neither the path nor the query: some paste their key into an address. The application logs the
    # path without it, under the same trace.
    return apigateway.AccessLogFormat.custom(
        json.dumps(
            {
                "requestId": field.context_request_id(),
                "trace": field.context_xray_trace_id(),
                "time": field.context_request_time(),
                "address": field.context_identity_source_ip(),
                "agent": field.context_identity_user_agent(),
                "method": field.context_http_method(),
                "resource": field.context_resource_path(),
                "status": field.context_status(),
                "bytes": field.context_response_length(),
                "milliseconds": field.context_response_latency(),
                "functionMilliseconds": field.context_integration_latency(),
                "errorType": field.context_error_response_type(),
                "functionError": field.context_integration_error_message(),
            }
        )
    )


def _responses(environment: Environment) -> dict[str, tuple[errors.VoxgateError, str | None]]:
    """Each of API Gateway's own answers: the error, and its status where it is not that of what it stands for."""
    invalid = errors.InvalidInput("API Gateway could not read this request.")
    forbidden = errors.Forbidden("This request is not allowed here.", code="permission_denied")
    unauthenticated = errors.Unauthenticated("The request carries no credentials that are accepted here.")
    fault = errors.VoxgateError("Something went wrong here; quote the x-request-id when you report it.")
    too_large = errors.TooLarge(_too_large(environment), param="file")
    late = errors.ProviderUnavailable(
        f"The transcription did not finish within {environment.api.timeout_seconds} seconds; send a shorter recording."
    )
    busy = errors.RateLimited("This service takes too many requests at once; ask again in a second.", wait=1)
    missing = errors.NotFound("There is nothing at this path.")
    of: dict[errors.VoxgateError, Sequence[str]] = {
        invalid: ("DEFAULT_4XX", "BAD_REQUEST_BODY", "BAD_REQUEST_PARAMETERS", "UNSUPPORTED_MEDIA_TYPE"),
        forbidden: ("ACCESS_DENIED", "INVALID_API_KEY", "WAF_FILTERED"),
        unauthenticated: ("UNAUTHORIZED", "EXPIRED_TOKEN", "INVALID_SIGNATURE"),
        fault: ("DEFAULT_5XX", "API_CONFIGURATION_ERROR", "AUTHORIZER_CONFIGURATION_ERROR", "AUTHORIZER_FAILURE"),
        too_large: ("REQUEST_TOO_LARGE",),
        late: ("INTEGRATION_TIMEOUT", "INTEGRATION_FAILURE"),
        busy: ("THROTTLED", "QUOTA_EXCEEDED"),
        # API Gateway's word for a path or a method that it does not have, which is no matter of a token.
        missing: ("MISSING_AUTHENTICATION_TOKEN", "RESOURCE_NOT_FOUND"),
    }
    plain = {"DEFAULT_4XX", "DEFAULT_5XX"}  # which keep the status of what they stand in for
    special = {"INTEGRATION_TIMEOUT": "504", "INTEGRATION_FAILURE": "504", "UNSUPPORTED_MEDIA_TYPE": "415"}
    return {
        name: (error, None if name in plain else special.get(name, str(error.status)))
        for error, names in of.items()
        for name in names
    }


def _too_large(environment: Environment) -> str:
    if environment.ingress is None:
        return (
            f"Maximum content size limit ({environment.cut}) exceeded: send a shorter recording, or a compressed one."
        )
    return "The upload is too large for this path: send it with a Content-Length header, or a shorter recording."
