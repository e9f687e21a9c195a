-- Health of a FineTuneJob in Argo CD, as for a Job: Healthy after success, Progressing before its end.
local states = {Succeeded = "Healthy", Failed = "Degraded", Suspended = "Suspended"}
local status = obj.status or {}

if status.phase == nil or (status.observedGeneration or 0) < (obj.metadata.generation or 0) then
  return {status = "Progressing", message = "waits for the operator"}
end

local message = status.phase
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == status.phase and condition.status == "True" then
    message = condition.reason .. ": " .. (condition.message or "")
  end
end
if states[status.phase] == nil and status.step ~= nil and status.step ~= "" then
  message = status.phase .. ", stage " .. (status.stage or "") .. ", step " .. status.step
end
return {status = states[status.phase] or "Progressing", message = message}
